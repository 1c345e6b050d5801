"""Forward time with token routing, over the dense forward time multiplied by the average width of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from tqdm import tqdm

from benchmarks import interleaved, print_settings, ratio
from flextron_mcore.adaptive.latency import RandomRouter
from flextron_mcore.choosing import set_subnetwork
from flextron_mcore.config import ModelConfig
from flextron_mcore.layers.state import FULL, LayerState
from flextron_mcore.layers.tokens.layer import FixedLevels
from flextron_mcore.model import build_model
from flextron_mcore.runs.terminal import print_table
from flextron_mcore.runtime import distributed
from flextron_mcore.runtime.distributed import device
from flextron_mcore.runtime.memory import keep_freed_memory
from flextron_mcore.space import ElasticSpace, SubNetwork

PROMPT, GENERATED, ROUNDS, ROUTER = 64, 32, 9, 64
LAYERS, VOCAB = 2, 1024
FRACTIONS = (0.25, 0.5, 0.75, 1.0)
MEAN = sum(FRACTIONS) / len(FRACTIONS)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, and of the tokens of a forward pass (batch x length)."""

    hidden: int
    heads: int
    groups: int
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.hidden}, {self.heads} heads in {self.groups} groups, {self.batch} x {self.length}"


# Shapes for a CPU, in fp32. The last one is the quickstart's model.
SHAPES = (
    Shape(2048, 16, 16, 1, 1024),
    Shape(1024, 16, 16, 2, 1024),
    Shape(1024, 16, 4, 2, 1024),
    Shape(512, 16, 16, 2, 1024),
    Shape(192, 8, 8, 8, 256),
)
# Shapes for CUDA, in bf16.
GPU_SHAPES = (Shape(4096, 32, 32, 16, 2048), Shape(4096, 32, 8, 16, 2048), Shape(4096, 32, 32, 4, 2048))


def run() -> None:
    """Run the benchmark and print its table."""
    distributed.initialize()
    keep_freed_memory()
    shapes, precision = (GPU_SHAPES, "bf16") if device().type == "cuda" else (SHAPES, "fp32")
    print_settings(
        "dispatch: forward time with uniformly mixed levels / dense forward time x average width of the tokens",
        f"{LAYERS} layers, FFN 2.75 x hidden size, vocabulary {VOCAB}, {precision}; levels {', '.join(map(str, FRACTIONS))}, "
        f"each for a quarter of the tokens; routers with {ROUTER} hidden units",
        f"median (quartiles) of {ROUNDS} paired rounds",
    )
    rows = []
    with torch.no_grad(), tqdm(desc="dispatch", unit="row") as bar:
        for shape in shapes:
            arch = ModelConfig(
                num_layers=LAYERS,
                hidden_size=shape.hidden,
                num_attention_heads=shape.heads,
                num_query_groups=shape.groups,
                ffn_hidden_size=shape.hidden * 11 // 4,
                vocab_size=VOCAB,
                max_position_embeddings=shape.length,
            )
            space = ElasticSpace.build(arch, granularity=1, heads=FRACTIONS, ffn_hidden_size=FRACTIONS)
            model = build_model(arch, space, precision=precision).eval()
            for name, pair, scale, *before in (*_blocks(model, shape), *_models(model, arch, space, shape)):
                seconds = interleaved(pair, ROUNDS, *before)
                (first, ours), (second, theirs) = seconds.items()
                found = ratio(ours, [value * scale for value in theirs])
                rows.append(
                    [
                        str(shape),
                        name,
                        f"{first} / {second}",
                        f"{1000 * min(ours):.1f}",
                        f"{1000 * min(theirs):.1f}",
                        f"{scale:g}",
                        str(found),
                    ]
                )
                bar.update()
    print_table("dispatch", ["hidden size, heads, tokens", "what", "A / B", "A ms", "B ms", "times", "A / (B x times)"], rows)


def _levels(length: int, batch: int) -> torch.Tensor:
    """Random level of each token in each block, [blocks, length, batch]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, len(FRACTIONS), (2 * LAYERS, length, batch), generator=generator).to(device())


def _blocks(model: torch.nn.Module, shape: Shape):
    """Yield (name, {"mixed": function, "dense": function}, factor of the second time) of single blocks to time."""
    layer, levels = model.decoder.layers[0], _levels(shape.length, shape.batch)
    like = next(model.parameters())
    hidden = torch.randn(shape.length, shape.batch, shape.hidden, device=like.device, dtype=like.dtype)
    rotary = model.rotary_pos_emb(shape.length)

    def mlp(routing: FixedLevels | None) -> Callable[[], object]:
        def call() -> object:
            if routing:
                routing.begin()
            layer.holder.state = LayerState(routing=routing.layer(0) if routing else None)
            return layer.mlp(hidden)

        return call

    def attention(routing: FixedLevels | None) -> Callable[[], object]:
        def call() -> object:
            if routing:
                routing.begin()
            layer.holder.state = LayerState(routing=routing.layer(0) if routing else None)
            return layer.self_attention(hidden, None, rotary_pos_emb=rotary)

        return call

    router = RandomRouter(shape.hidden, ROUTER, len(FRACTIONS))
    yield "MLP", {"mixed": mlp(FixedLevels(levels)), "dense": mlp(None)}, MEAN
    yield "attention, own keys", {"mixed": attention(FixedLevels(levels, "own")), "dense": attention(None)}, MEAN
    yield "attention, all keys", {"mixed": attention(FixedLevels(levels, "full")), "dense": attention(None)}, MEAN
    yield "router", {"router": lambda: router(0, hidden), "dense MLP": mlp(None)}, 1.0
    layer.holder.state = FULL


def _models(model: torch.nn.Module, arch: ModelConfig, space: ElasticSpace, shape: Shape):
    """Pairs of whole models to time: tokens at mixed levels with routers, and a static sub-network of the same average width.

    Yields (name, {"mixed": function, "static": function}, factor of the second time[, functions to run untimed before each]).
    """
    tokens = torch.randint(0, VOCAB, (shape.batch, shape.length), device=device())
    half = len(FRACTIONS) // 2
    widths = [(space.heads[i], space.ffn_hidden_size[i]) for i in (half - 1, half)]
    layers = tuple(space.layer_choice(arch, *widths[i % 2]) for i in range(LAYERS))
    static = SubNetwork(arch.hidden_size, layers)
    router = RandomRouter(arch.hidden_size, ROUTER, len(FRACTIONS))
    for policy, keys in (("own", "own"), ("full", "all")):
        prompt = FixedLevels(_levels(shape.length, shape.batch), policy, router)
        one = FixedLevels(_levels(PROMPT + GENERATED, 1), policy, router)
        pair = {name: _prefill(model, net, tokens) for name, net in (("mixed", prompt), ("static", static))}
        yield f"prefill, {keys} keys", pair, 1.0
        both = {name: _Decode(model, net, tokens[:1]) for name, net in (("mixed", one), ("static", static))}
        prompts = {name: decode.prompt for name, decode in both.items()}
        yield f"prompt of {PROMPT} tokens, batch 1, {keys} keys", prompts, 1.0
        tokens_after = {name: decode.one_by_one for name, decode in both.items()}
        yield f"{GENERATED} tokens after it, one by one, {keys} keys", tokens_after, 1.0, prompts


def _prefill(model: torch.nn.Module, net: SubNetwork | FixedLevels, tokens: torch.Tensor) -> Callable[[], object]:
    positions = torch.arange(tokens.shape[1], device=device()).expand(len(tokens), -1)

    def call() -> object:
        if isinstance(net, FixedLevels):
            net.begin()
        set_subnetwork(model, net)
        return model(tokens, positions, None)

    return call


class _Decode:
    """Decoding of one sequence with a KV cache: a prompt, then one token at a time."""

    def __init__(self, model: torch.nn.Module, net: SubNetwork | FixedLevels, tokens: torch.Tensor) -> None:
        self.model, self.net, self.tokens = model, net, tokens
        self.positions = torch.arange(PROMPT + GENERATED, device=device())[None]

    def prompt(self) -> None:
        """Run the prompt into a new cache."""
        if isinstance(self.net, FixedLevels):
            self.net.begin()
        self.context = StaticInferenceContext(1, PROMPT + GENERATED)
        self._run(0, PROMPT)
        self.context.enable_decode_mode()

    def one_by_one(self) -> None:
        """Run the tokens after the prompt, one at a time."""
        for start in range(PROMPT, PROMPT + GENERATED):
            self._run(start, start + 1)

    def _run(self, start: int, end: int) -> None:
        set_subnetwork(self.model, self.net)
        at = self.tokens[:, start:end], self.positions[:, start:end], None
        self.model(*at, inference_context=self.context, runtime_gather_output=True)
        self.context.sequence_len_offset = end
