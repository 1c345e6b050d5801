"""Memory that `latency` and `select` say they need, beside the peak of allocations while the workload runs."""

from __future__ import annotations

import pytest

from flextron_mcore.config import ModelConfig
from flextron_mcore.latency.measure import Setting, runner
from flextron_mcore.launch.activations import activations
from flextron_mcore.launch.layout import Layout, Rank
from flextron_mcore.model import build_model
from flextron_mcore.settings.compose import compose
from flextron_mcore.space import ElasticSpace
from tests.memory import peak

LENGTH = 512


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["prefill", "generation"])
@pytest.mark.parametrize("vocab_size, samples", [(300, 2), (6000, 1), (6000, 3)])
def test_a_pass_needs_what_was_estimated(vocab_size, samples, kind, dtype):
    """A prefill holds the logits of all tokens, and of several samples a copy; a generation those of the last tokens."""
    arch = ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=128,
        vocab_size=vocab_size,
        max_position_embeddings=2 * LENGTH,
    )
    space = ElasticSpace.build(arch)
    model = build_model(arch, space, precision=dtype).eval()
    generated = 4 if kind == "generation" else 1
    run = runner(model, Setting(kind, samples, LENGTH, generated), vocab_size, seed=1)
    run()
    measured = peak(run)
    keys = [
        f"setting.kind={kind}",
        f"setting.batch_size={samples}",
        f"setting.prompt_length={LENGTH}",
        f"trainer.precision={dtype}",
    ]
    keys += [f"setting.generated_tokens={generated}"] if kind == "generation" else []
    settings = compose("latency", ["checkpoint=c", "out=o", *keys])
    layout = Layout.read(arch, space, settings, 1, dtype, False)
    assert activations(Rank(arch, layout, 0), settings) == pytest.approx(measured, rel=0.05)
