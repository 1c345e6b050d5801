"""Small models that the tests share."""

from __future__ import annotations

import torch

from flextron_mcore.config import ModelConfig
from flextron_mcore.model import build_model
from flextron_mcore.space import ElasticSpace, LayerChoice, SubNetwork

VOCAB, LENGTH = 67, 24

LLAMA = dict(activation="swiglu", normalization="rmsnorm", position_embedding_type="rope", bias=False)
GPT2 = dict(activation="gelu_tanh", normalization="layernorm", position_embedding_type="learned_absolute", bias=True)


def config(**changes) -> ModelConfig:
    values = dict(
        num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, vocab_size=VOCAB, max_position_embeddings=LENGTH
    )  # fmt: skip
    return ModelConfig(**{**values, **LLAMA, **changes})


def model(arch: ModelConfig, space: ElasticSpace, seed: int = 0) -> torch.nn.Module:
    """Random weights; norms and biases too, so that a lost one shows."""
    torch.manual_seed(seed)
    gpt = build_model(arch, space)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.25)
            if parameter.dim() == 1:
                parameter.add_(0.75)
    return gpt.eval()


def inputs(batch: int = 2, seed: int = 0, vocab: int = VOCAB, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.arange(length).expand(batch, -1)


def random_network(arch: ModelConfig, space: ElasticSpace, seed: int) -> SubNetwork:
    generator = torch.Generator().manual_seed(seed)
    pick = lambda values: values[int(torch.randint(len(values), (1,), generator=generator))]  # noqa: E731
    layers: tuple[LayerChoice, ...] = tuple(
        space.layer_choice(arch, pick(space.heads), pick(space.ffn_hidden_size)) for _ in range(arch.num_layers)
    )
    return SubNetwork(arch.hidden_size, layers)
