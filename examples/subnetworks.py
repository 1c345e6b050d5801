"""Time sub-networks of Megatron-Core's GPTModel with elastic layers, which compute with slices of one set of weights.

    python examples/subnetworks.py

Builds a small Llama-style model with random weights, and times forward and backward passes of its uniform sub-networks.
"""

from __future__ import annotations

import time

from flextron_mcore.runtime.environment import prepare_environment

prepare_environment()

import torch  # noqa: E402

from flextron_mcore.config import ModelConfig  # noqa: E402
from flextron_mcore.evaluation.family import uniform_family  # noqa: E402
from flextron_mcore.runtime import distributed  # noqa: E402
from flextron_mcore.space import ElasticSpace, count_parameters  # noqa: E402

BATCH, LENGTH = 2, 256


def main() -> None:
    distributed.initialize()
    from flextron_mcore.choosing import use_subnetwork
    from flextron_mcore.model import build_model

    arch = ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=8, ffn_hidden_size=1024, vocab_size=512,
                       max_position_embeddings=LENGTH)  # fmt: skip
    space = ElasticSpace.build(arch)
    model = build_model(arch, space)
    device = distributed.device()
    tokens = torch.randint(0, arch.vocab_size, (BATCH, LENGTH), device=device)
    positions = torch.arange(LENGTH, device=device).expand(BATCH, -1)
    print(f"candidates: heads {space.heads}, FFN {space.ffn_hidden_size}, granularity {space.granularity}")
    for name, net in uniform_family(arch, space).items():
        seconds = []
        for _ in range(4):
            begun = time.perf_counter()
            with use_subnetwork(model, net):
                loss = model(tokens, positions, None, labels=tokens).mean()
            loss.backward()
            seconds.append(time.perf_counter() - begun)
        print(f"{name:28s}{count_parameters(arch, net):>12,} parameters{1000 * min(seconds):8.0f} ms forward and backward")
    distributed.shutdown()


if __name__ == "__main__":
    main()
