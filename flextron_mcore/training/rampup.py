"""Global batch size of each step: constant, or rising as Megatron-Core's rampup_batch_size has it."""

from __future__ import annotations

from flextron_mcore.config import FlextronError
from flextron_mcore.settings.sections import BatchSettings


class BatchSizes:
    """Global batch sizes of a training's steps. They depend on the step only, so that a resumed run continues exactly.

    Args:
        model: section `model` of the settings.
        steps: number of steps of the whole training.

    Attributes:
        steps: number of steps of the whole training.
        first: first sample of each step of the rampup, and of the step after it.
        size: samples of every later step.
        sizes: distinct global batch sizes, ascending.

    Raises FlextronError if Megatron-Core's rule has no batch sizes for the keys.
    """

    def __init__(self, model: BatchSettings, steps: int) -> None:
        self.steps = steps
        self.size, self.first, self.sizes = model.global_batch_size, [0], [model.global_batch_size]
        rampup = getattr(model, "rampup_batch_size", None)
        if rampup is None:
            return
        _check(rampup, self.size)
        # The rule of Megatron-Core 0.16, which 0.19 has no more: as many samples for each increment.
        begin, increment, samples = rampup
        each = samples / ((self.size - begin) // increment)
        while len(self.first) <= steps and self.first[-1] <= samples:
            self.first.append(self.first[-1] + begin + int(self.first[-1] / each) * increment)
        found = {after - before for before, after in zip(self.first, self.first[1:], strict=False)}
        self.sizes = sorted({*found, self.size})

    @property
    def largest(self) -> int:
        """Largest global batch size that a step has, which is the last step's."""
        return self.of(self.steps - 1)

    def check(self, micro_batch: int, ranks: int) -> None:
        """Raise FlextronError for a batch size of the rampup that micro-batches on data-parallel ranks do not divide.

        Args:
            micro_batch: samples of a forward pass.
            ranks: number of data-parallel ranks.
        """
        step = micro_batch * ranks
        if odd := [size for size in self.sizes if size % step]:
            raise FlextronError(
                f"model.rampup_batch_size: leads to a global batch size of {odd[0]}, which is not a multiple of "
                f"model.micro_batch_size={micro_batch} x {ranks} data-parallel rank(s): use multiples of {step} as start and "
                "increment"
            )

    def start(self, step: int) -> int:
        """Number of samples before a step, the first of which is 0."""
        last = len(self.first) - 1
        return self.first[step] if step <= last else self.first[last] + (step - last) * self.size

    def of(self, step: int) -> int:
        """Global batch size of a step."""
        return self.start(step + 1) - self.start(step)


def _check(rampup: list[int], size: int) -> None:
    """Raise FlextronError unless the sizes from `start` in steps of `increment` end at the global batch size."""
    start, increment, _ = rampup
    shown = f"model.rampup_batch_size=[{','.join(map(str, rampup))}]"
    if start >= size or (size - start) % increment:
        raise FlextronError(
            f"{shown}: does not lead to model.global_batch_size={size}: [start, increment, samples] must have a start below it, "
            "from which it is a whole number of increments away"
        )
