"""Small random models, their inputs and checkpoints, for all tests."""

from __future__ import annotations

from pathlib import Path

import torch

from flextron_mcore.checkpoint.store import CheckpointInfo, iteration_path
from flextron_mcore.checkpoint.writer import LazyTensor, write_streaming
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
    """Model with random weights, norms and biases too, so that a lost tensor changes the logits.

    Norms scale by about 0.75 in every form, so that logits, and their rounding errors, are of the same size.
    """
    torch.manual_seed(seed)
    gpt = build_model(arch, space)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            parameter.normal_(std=0.25)
            if parameter.dim() == 1:
                zero_centered = arch.normalization == "layernorm1p" and name.endswith("layernorm.weight")
                parameter.add_(0.75 - zero_centered)
        for name, matrix in gpt.named_buffers():
            if name.endswith("compensation"):
                matrix.add_(torch.randn(matrix.shape).tril(-1) / 2)
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
    return space.network(arch, layers, pick(space.hidden_size), pick(space.depth))


def memory_names(model) -> dict[str, torch.Tensor]:
    """{name on disk: tensor in memory}. On disk a norm has the name of the linear layer that follows it."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        if tensor is not None:
            name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
            renamed[name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")] = tensor
    return renamed


def write(model, info: CheckpointInfo, run: Path) -> Path:
    """Write the model as a checkpoint below `run`/checkpoints, and return its directory."""
    tensors = {k: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for k, t in memory_names(model).items()}
    folder = iteration_path(run, info.step)
    folder.mkdir(parents=True)
    write_streaming(folder, info, tensors)
    return folder
