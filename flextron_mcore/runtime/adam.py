"""Adam in plain torch with the state layout of Transformer Engine's and apex's FusedAdam, for machines without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101), or Adam with adam_w_mode=False.

    The step count is in the parameter group, and the state of a parameter is `exp_avg` and `exp_avg_sq`, both fp32.
    Megatron-Core's distributed optimizer saves and loads this layout, but not the state of torch.optim.AdamW.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate.
        betas: decay rates of the moving averages of the gradient and of its square.
        eps: term added to the denominator for numerical stability.
        weight_decay: weight decay coefficient; a step multiplies the weights by 1 - lr * weight_decay.
        adam_w_mode: decoupled weight decay (AdamW); False: add weight_decay * weight to the gradient (L2 penalty).
        ignored: other options of FusedAdam, which have no effect on the result.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **ignored: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = step = int(group.get("step", 0)) + 1
            beta1, beta2 = group["betas"]
            correction1, correction2 = 1 - beta1**step, 1 - beta2**step
            for parameter in group["params"]:
                if parameter.grad is None or not parameter.numel():
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
                gradient, mean, square = parameter.grad.float(), state["exp_avg"], state["exp_avg_sq"]
                if group["weight_decay"]:
                    if self.adam_w_mode:
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    else:
                        gradient = gradient.add(parameter, alpha=group["weight_decay"])
                mean.lerp_(gradient, 1 - beta1)
                square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                denominator = square.sqrt().div_(correction2**0.5).add_(group["eps"])
                parameter.addcdiv_(mean, denominator, value=-group["lr"] / correction1)
