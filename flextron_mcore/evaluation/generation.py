"""Generation of text from a sub-network or with token routing, with Megatron-Core's KV cache.

Shape suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from flextron_mcore.choosing import Network, use_subnetwork
from flextron_mcore.runtime.distributed import device
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.space import SubNetwork


@dataclass(frozen=True)
class Generated:
    """Continuations of prompts, and the time that they took.

    Attributes:
        ids: token ids added to each prompt, the one that ended the text included.
        prompt_seconds: seconds of the first forward pass, over as many tokens as the shortest prompt has.
        decode_seconds: seconds of all further passes, of one token each.
    """

    ids: list[list[int]]
    prompt_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Sampling:
    """Rule by which the next token is chosen from the logits.

    Attributes:
        temperature: 0 for the likeliest token; else tokens are drawn from softmax(logits / temperature).
        top_k: draw from the top_k likeliest tokens; 0 for all.
        seed: seed of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 1234


def generate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    network: Network,
    max_new_tokens: int,
    ends: Collection[int] = (),
    sampling: Sampling | None = None,
    progress: Callable[[], object] = lambda: None,
    finished: Callable[[Sequence[int]], bool] = lambda ids: False,
) -> Generated:
    """Continue prompts with generated tokens. Call on all ranks with the same arguments; all return the same tokens.

    The prompts are one batch without padding: the first pass has as many tokens as the shortest prompt, and the rest of longer
    prompts follows token by token. Without sampling, each sequence gets the tokens that it would get alone. Token routing does
    not count tokens after a sequence's end in its statistics.

    Rotary frequencies of LongRoPE change with the first token after the original context. All tokens are then computed again,
    as transformers' Phi-3 does, and prompts of more tokens than that are a batch of their own.

    Args:
        model: this rank's tensor-parallel part of the model, which is whole on a single rank; no pipeline parallelism.
        prompts: token ids of each prompt, at least one each.
        network: sub-network or token routing; None for the full model.
        max_new_tokens: largest number of tokens added to a prompt.
        ends: token ids that end a sequence.
        sampling: rule by which the next token is chosen; None for the likeliest token.
        progress: called after each pass.
        finished: function of the token ids added to a prompt; True ends the sequence.
    """
    sampling = sampling or Sampling()
    lengths, short = [len(prompt) for prompt in prompts], unwrap(model).architecture.short_context
    if short is not None and min(lengths) <= short < max(lengths):
        return _apart(
            lambda some: generate(model, some, network, max_new_tokens, ends, sampling, progress, finished), prompts, short
        )
    total = max(lengths) + max_new_tokens
    tokens = torch.zeros(len(prompts), total, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(list(prompt))
    limits = [length + max_new_tokens for length in lengths]
    generator = torch.Generator().manual_seed(sampling.seed)
    context = StaticInferenceContext(len(prompts), total)
    positions = torch.arange(total).expand(len(prompts), -1)
    began, done, start = time.perf_counter(), [False] * len(prompts), 0
    prompt_seconds = 0.0
    for stop in range(min(lengths), total):
        new = stop - start
        if short is not None and start <= short < stop:
            context, start = StaticInferenceContext(len(prompts), total), 0
        logits_BV = _next(model, network, context, tokens, positions, start, stop, new, done)
        start = stop
        chosen = _choose(logits_BV, sampling, generator)
        for i, length in enumerate(lengths):
            if length <= stop < limits[i] and not done[i]:
                tokens[i, stop] = chosen[i]
                if chosen[i] in ends or finished(tokens[i, length : stop + 1].tolist()):
                    limits[i] = stop + 1
            done[i] = stop + 1 >= limits[i]
        progress()
        if not prompt_seconds:
            prompt_seconds = time.perf_counter() - began
        if all(done):
            break
    seconds = time.perf_counter() - began - prompt_seconds
    return Generated([tokens[i, n : limits[i]].tolist() for i, n in enumerate(lengths)], prompt_seconds, seconds)


def _apart(generated: Callable[[list[Sequence[int]]], Generated], prompts: Sequence[Sequence[int]], short: int) -> Generated:
    """Continuations of prompts of at most `short` tokens, and of longer ones, generated as two batches.

    generated: function that continues a batch of prompts.
    """
    long = [len(prompt) > short for prompt in prompts]
    parts = [
        generated([prompt for prompt, is_long in zip(prompts, long, strict=True) if is_long == kind]) for kind in (False, True)
    ]
    ids = [iter(part.ids) for part in parts]
    return Generated(
        [next(ids[kind]) for kind in long],
        *(sum(times) for times in zip(*((p.prompt_seconds, p.decode_seconds) for p in parts), strict=True)),
    )


@torch.no_grad()
def _next(
    model: torch.nn.Module,
    network: Network,
    context: StaticInferenceContext,
    tokens: Tensor,
    positions: Tensor,
    start: int,
    stop: int,
    new: int,
    done: Sequence[bool],
) -> Tensor:
    """Run tokens[:, start:stop], which adds them to the KV cache `context`, and return the next token's logits [B, V] on the CPU.

    Args:
        model: this rank's part of the model.
        network: sub-network or token routing; None for the full model.
        context: Megatron-Core's static KV cache.
        tokens: token ids of all sequences [B, length].
        positions: positions of these tokens [B, length].
        start, stop: range of tokens to run.
        new: how many of these tokens, the last ones, token routing counts in its statistics.
        done: True for a sequence past its end, whose tokens are not counted.
    """
    part = slice(start, stop)
    if network is not None and not isinstance(network, SubNetwork):
        counted_S = torch.arange(start, stop) >= stop - new
        network.begin(0, (~torch.tensor(done)[:, None] & counted_S).to(device()))
    with use_subnetwork(model, network):
        logits = model(
            tokens[:, part].to(device()),
            positions[:, part].to(device()),
            None,
            inference_context=context,
            runtime_gather_output=True,
        )
    context.sequence_len_offset = stop
    context.enable_decode_mode()
    return logits[:, -1, : unwrap(model).real_vocab_size].float().cpu()  # without the padding of the vocabulary


def _choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> list[int]:
    """Next token id of each sequence, by the rule `sampling`; `generator` is the source of random numbers."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).tolist()
    scaled_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        least_B1 = scaled_BV.topk(min(sampling.top_k, scaled_BV.shape[-1])).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < least_B1, -torch.inf)
    return torch.multinomial(scaled_BV.softmax(-1), 1, generator=generator).squeeze(-1).tolist()
