"""Values that tests/gpu/test_parity.py compares. `python -m tests.gpu.parity FILE` computes the reference on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# (kind of model, KV groups, elastic unit of attention)
CASES = {
    "llama, KV groups": ("llama", 4, "kv_group"),
    "llama, grouped, KV groups": ("llama", 2, "kv_group"),
    "llama, query heads": ("llama", 2, "query_head"),
    "gpt2, KV groups": ("gpt2", 4, "kv_group"),
    "gpt2, query heads": ("gpt2", 2, "query_head"),
}
PROMPT, MICRO_BATCHES, BATCH = 7, 2, 2


def compute(case: str, precision: str, state: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, Tensor]]:
    """Compute on this process's device, and return on the CPU: {group: {name: tensor}}.

    The groups are state, logits, decoded, losses, gradients and scores.

    Args:
        case: name of a model in CASES.
        precision: fp32 or bf16.
        state: weights by name; None: random ones that bf16 holds exactly.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.transformer.module import Float16Module

    from flextron_mcore.choosing import use_subnetwork
    from flextron_mcore.layers.tokens.layer import FixedLevels
    from flextron_mcore.model import build_model
    from flextron_mcore.pipeline.networks import Teaching, run_networks
    from flextron_mcore.runtime.distributed import device
    from flextron_mcore.settings.sections import KV_POLICIES
    from flextron_mcore.sorting.importance import importance
    from flextron_mcore.space import ElasticSpace
    from tests import toy

    kind, groups, unit = CASES[case]
    arch = toy.config(**(toy.LLAMA if kind == "llama" else toy.GPT2), num_query_groups=groups)
    space = ElasticSpace.build(arch, attention_unit=unit, heads=[0.5, 1.0])
    networks = {"full": None, "half": space.uniform(arch, 2, 24), "mixed": toy.random_network(arch, space, 3)}
    generator, sizes = torch.Generator().manual_seed(4), (len(space.heads), len(space.ffn_hidden_size))
    # Levels of every block; -1: a token that is skipped (padding).
    levels = [torch.randint(-1, sizes[n % 2], (toy.LENGTH, BATCH), generator=generator) for n in range(2 * arch.num_layers)]
    networks |= {f"levels, {policy}": FixedLevels(torch.stack(levels).to(device()), policy) for policy in KV_POLICIES}
    if state is None:
        state = {k: v.bfloat16().float() for k, v in toy.model(arch, space).state_dict().items() if v is not None}
    gpt = build_model(arch, space, precision=precision)
    gpt.load_state_dict(state, strict=False)
    model = (Float16Module(gpt.config, gpt) if precision == "bf16" else gpt).eval()
    ddp = DistributedDataParallel(gpt.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    gpt.config.finalize_model_grads_func = finalize_model_grads

    tokens, positions = (x.to(device()) for x in toy.inputs(BATCH))
    found: dict[str, dict[str, Tensor]] = {"state": dict(state), "logits": {}, "decoded": {}}
    for name, net in networks.items():
        with torch.no_grad(), use_subnetwork(model, net):
            begin = getattr(net, "begin", lambda: None)
            begin()
            found["logits"][name] = model(tokens, positions, None)
            begin()
            found["decoded"][name] = _decode(model, tokens, positions)

    def batches() -> Iterator[dict[str, Tensor]]:
        for i in range(MICRO_BATCHES):
            more, places = toy.inputs(BATCH, seed=i, length=toy.LENGTH + 1)
            mask = torch.ones(BATCH, toy.LENGTH)
            mask[0, : 3 * i] = 0
            yield {"tokens": more[:, :-1], "labels": more[:, 1:], "loss_mask": mask, "position_ids": places[:, :-1]}

    ddp.zero_grad_buffer()
    teach = Teaching(weight=0.4, temperature=2.0)
    losses = run_networks([ddp], batches, MICRO_BATCHES, list(networks.values()), toy.LENGTH, BATCH, teach=teach)
    found["losses"] = dict(zip(networks, losses[:, 0] / losses[:, 1], strict=True))
    found["gradients"] = {name: parameter.main_grad for name, parameter in gpt.named_parameters()}
    scores = importance([model], batches, MICRO_BATCHES, toy.LENGTH, BATCH)
    found["scores"] = {f"{i} {axis}": units for i, own in scores.layers.items() for axis, units in own.units.items()}
    found["scores"]["channels"] = scores.channels
    return {group: {name: x.detach().float().cpu() for name, x in values.items()} for group, values in found.items()}


def _decode(model: torch.nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits after a prompt and after each further token, with a KV cache."""
    from megatron.core.inference.contexts import StaticInferenceContext

    count, length = tokens.shape
    context, found = StaticInferenceContext(count, length), []
    for start, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, length))]:
        part = slice(start, end)
        found.append(model(tokens[:, part], positions[:, part], None, inference_context=context, runtime_gather_output=True))
        context.sequence_len_offset = end
        context.enable_decode_mode()
    return torch.cat([x[:, -1:] for x in found], 1)


def main(file: str) -> None:
    """Compute all cases in fp32 on the CPU and save them to `file`."""
    if torch.cuda.is_available():
        sys.exit("tests.gpu.parity: the reference is the CPU's: set CUDA_VISIBLE_DEVICES= (empty)")
    sys.modules |= {"transformer_engine": None, "apex": None}  # they may fail to load without a GPU
    from flextron_mcore.runtime import distributed
    from flextron_mcore.runtime.environment import prepare_environment

    prepare_environment()
    distributed.initialize(seed=1234)
    torch.save({case: compute(case, "fp32") for case in CASES}, file)
    distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
