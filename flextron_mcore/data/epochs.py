"""Epochs of a training: the number of times that it reads the text of each domain."""

from __future__ import annotations

from collections.abc import Mapping

from .blend import PreparedData, check_weights

MOST_EPOCHS = 4  # up to which repeated text is nearly worth new text (Muennighoff et al., arXiv:2305.16264)
_NAMED = 8  # domains that a line names


def epochs(data: PreparedData, weights: Mapping[str, float] | None, tokens: int) -> dict[str, float]:
    """{domain: number of times that a training reads its training tokens}, most often first.

    Args:
        data: prepared data.
        weights: {domain: weight}, as for `blend.train_dataset`.
        tokens: tokens of the whole training.
    """
    chosen = check_weights(data, weights)
    total = sum(chosen.values())
    found = {name: tokens * weight / total / max(1, data.domains[name].train_tokens) for name, weight in chosen.items()}
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def reading(data: PreparedData, weights: Mapping[str, float] | None, tokens: int) -> str:
    """Text such as `reads 1,000,000 of 800,000 tokens: code 2.5 times, web 0.7 times`.

    Args:
        data: prepared data.
        weights: {domain: weight}, as for `epochs`.
        tokens: tokens of the whole training.
    """
    found = epochs(data, weights, tokens)
    there = sum(data.domains[name].train_tokens for name in found)
    named = [f"{name} {_shown(times)} times" for name, times in list(found.items())[:_NAMED]]
    others = f" and {len(found) - _NAMED} others less often" if len(found) > _NAMED else ""
    return f"reads {tokens:,} tokens from {there:,}: {', '.join(named)}{others}"


def repeated(data: PreparedData, weights: Mapping[str, float] | None, tokens: int) -> str | None:
    """Warning that a domain is read more than MOST_EPOCHS times; None if none is.

    Args:
        data: prepared data.
        weights: {domain: weight}, as for `epochs`.
        tokens: tokens of the whole training.
    """
    found = {name: times for name, times in epochs(data, weights, tokens).items() if times > MOST_EPOCHS}
    if not found:
        return None
    name = next(iter(found))
    others = f", and {len(found) - 1} other domain(s) more than {MOST_EPOCHS} times" if len(found) > 1 else ""
    remedy = f"a smaller data_weights.{name}, " if len(data.domains) > 1 else ""
    return (
        f"the text of '{name}' is read {_shown(found[name])} times{others}: repeated text teaches less from the fifth time on: "
        f"prepare more text, or train with {remedy}fewer trainer.max_steps"
    )


def _shown(times: float) -> str:
    """Number of times with two digits or as a whole number."""
    return f"{times:.2g}" if times < 9.95 else f"{times:,.0f}"
