"""Tokens that choose for themselves: blocks and whole models, forward, over dense time times the average width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from tqdm import tqdm

from benchmarks import interleaved, print_settings, ratio
from flextron_mcore.config import ModelConfig
from flextron_mcore.latency.routed import random_router
from flextron_mcore.layers.dispatch import GivenLevels
from flextron_mcore.model import build_model, set_subnetwork
from flextron_mcore.runtime import distributed
from flextron_mcore.runtime.distributed import device
from flextron_mcore.space import ElasticSpace, SubNetwork
from flextron_mcore.stages.common import print_table

BATCH, LENGTH, GENERATED, ROUNDS, ROUTER = 2, 1024, 32, 9, 64
LAYERS, HEADS, VOCAB = 2, 16, 1024
FRACTIONS = (0.25, 0.5, 0.75, 1.0)
MEAN = sum(FRACTIONS) / len(FRACTIONS)
# Hidden size, KV groups.
SHAPES = ((1024, 16), (1024, 4), (512, 16), (192, 16))


def run() -> None:
    """Print the ratios."""
    distributed.initialize()
    print_settings(
        "dispatch: tokens with uniformly mixed levels / dense time times their average width, forward only",
        f"{LAYERS} layers, {HEADS} heads, FFN 2.75 x hidden size, vocabulary {VOCAB}; {BATCH} x {LENGTH} tokens, fp32; levels "
        f"{', '.join(map(str, FRACTIONS))}, each for a quarter of the tokens; routers with {ROUTER} hidden units",
        f"median (quartiles) of {ROUNDS} paired rounds",
    )
    rows = []
    with torch.no_grad(), tqdm(desc="dispatch", unit="row") as bar:
        for hidden, groups in SHAPES:
            arch = ModelConfig(
                num_layers=LAYERS,
                hidden_size=hidden,
                num_attention_heads=HEADS,
                num_query_groups=groups,
                ffn_hidden_size=hidden * 11 // 4,
                vocab_size=VOCAB,
                max_position_embeddings=2 * LENGTH,
            )
            space = ElasticSpace.build(arch, granularity=1, heads=FRACTIONS, ffn_hidden_size=FRACTIONS)
            model = build_model(arch, space).eval()
            for name, pair, scale in (*_blocks(model, arch), *_models(model, arch, space)):
                seconds = interleaved(pair, ROUNDS)
                (first, ours), (second, theirs) = seconds.items()
                found = ratio(ours, [value * scale for value in theirs])
                shape = [str(hidden), str(groups), name, f"{first} / {second}"]
                rows.append([*shape, f"{1000 * min(ours):.1f}", f"{1000 * min(theirs):.1f}", f"{scale:g}", str(found)])
                bar.update()
    print_table("dispatch", ["hidden", "KV groups", "what", "A / B", "A ms", "B ms", "times", "A / (B x times)"], rows)


def _levels(length: int = LENGTH, batch: int = BATCH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, len(FRACTIONS), (2 * LAYERS, length, batch), generator=generator).to(device())


def _blocks(model: torch.nn.Module, arch: ModelConfig):
    layer = model.decoder.layers[0]
    hidden = torch.randn(LENGTH, BATCH, arch.hidden_size, device=device())
    rotary = model.rotary_pos_emb(LENGTH)

    def mlp(routing: GivenLevels | None) -> Callable[[], object]:
        def call() -> object:
            if routing:
                routing.begin()
            layer.mlp.routing = routing.block(1) if routing else None
            return layer.mlp(hidden)

        return call

    def attention(routing: GivenLevels | None) -> Callable[[], object]:
        def call() -> object:
            if routing:
                routing.begin()
            layer.self_attention.routing = routing.block(0) if routing else None
            return layer.self_attention(hidden, None, rotary_pos_emb=rotary)

        return call

    router = random_router(arch.hidden_size, ROUTER, len(FRACTIONS))
    yield "MLP", {"mixed": mlp(GivenLevels(_levels())), "dense": mlp(None)}, MEAN
    yield "attention, own keys", {"mixed": attention(GivenLevels(_levels(), "own")), "dense": attention(None)}, MEAN
    yield "attention, all keys", {"mixed": attention(GivenLevels(_levels(), "full")), "dense": attention(None)}, MEAN
    yield "router", {"router": lambda: router(0, hidden), "dense MLP": mlp(None)}, 1.0
    layer.mlp.routing = layer.self_attention.routing = None


def _models(model: torch.nn.Module, arch: ModelConfig, space: ElasticSpace):
    """Mixed levels with routers, and the static network whose layers have the same average width."""
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), device=device())
    half = len(FRACTIONS) // 2
    widths = [(space.heads[i], space.ffn_hidden_size[i]) for i in (half - 1, half)]
    layers = tuple(space.layer_choice(arch, *widths[i % 2]) for i in range(LAYERS))
    static = SubNetwork(arch.hidden_size, layers)
    router = random_router(arch.hidden_size, ROUTER, len(FRACTIONS))
    for policy, keys in (("own", "own"), ("full", "all")):
        prompt, one = GivenLevels(_levels(), policy, router), GivenLevels(_levels(LENGTH + GENERATED, 1), policy, router)
        pair = {name: _prefill(model, net, tokens) for name, net in (("mixed", prompt), ("static", static))}
        yield f"prefill, {keys} keys", pair, 1.0
        pair = {name: _decode(model, net, tokens[:1]) for name, net in (("mixed", one), ("static", static))}
        yield f"prompt and {GENERATED} tokens, {keys} keys", pair, 1.0


def _prefill(model: torch.nn.Module, net: SubNetwork | GivenLevels, tokens: torch.Tensor) -> Callable[[], object]:
    positions = torch.arange(tokens.shape[1], device=device()).expand(len(tokens), -1)

    def call() -> object:
        if isinstance(net, GivenLevels):
            net.begin()
        set_subnetwork(model, net)
        return model(tokens, positions, None)

    return call


def _decode(model: torch.nn.Module, net: SubNetwork | GivenLevels, prompt: torch.Tensor) -> Callable[[], object]:
    """A short prompt, and tokens one by one with a KV cache, at batch 1."""
    length = 64
    prompt = prompt[:, :length]
    positions = torch.arange(length + GENERATED, device=device())[None]

    def call() -> None:
        if isinstance(net, GivenLevels):
            net.begin()
        set_subnetwork(model, net)
        context = StaticInferenceContext(1, length + GENERATED)
        for start, end in [(0, length), *((t, t + 1) for t in range(length, length + GENERATED))]:
            tokens = prompt if start == 0 else prompt[:, :1]
            model(tokens, positions[:, start:end], None, inference_context=context, runtime_gather_output=True)
            context.sequence_len_offset = end
            context.enable_decode_mode()

    return call
