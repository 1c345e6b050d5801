"""examples/megatron_bridge: a Hugging Face model by Bridge's provider with our layer spec, and the forward step."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.doors import ElasticTraining
from flextron_mcore.runtime.unwrap import unwrap
from tests.stages.conftest import stage

pytest.importorskip("megatron.bridge", reason="Megatron-Bridge, or Transformer Engine, is not installed", exc_type=ImportError)
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "megatron_bridge" / "train_elastic.py"
WITHOUT_KERNELS = dict.fromkeys(
    ("bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion",
     "persist_layer_norm", "apply_rope_fusion", "bf16"), False
)  # fmt: skip


def test_provider_and_forward_step(tmp_path):
    spec = importlib.util.spec_from_file_location("train_elastic", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, vocab_size=128)
    hf = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).eval()
    hf.save_pretrained(tmp_path / "hf")
    stage("import", f"hf={tmp_path}/hf", f"out={tmp_path}/imported")
    info = open_checkpoint(tmp_path / "imported")
    elastic = ElasticTraining(info.model, info.space, count=3, seed=1234)
    dtypes = dict(params_dtype=torch.float32, pipeline_dtype=torch.float32, vocab_size=128, use_cpu_initialization=True)
    provider = example.elastic_provider(str(tmp_path / "hf"), info, elastic, **dtypes, **WITHOUT_KERNELS)
    provider.finalize()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    gpt = unwrap(model).eval()
    tokens, positions = torch.randint(0, 128, (2, 16)), torch.arange(16).expand(2, 16)

    masked = copy.deepcopy(hf)
    for layer in masked.model.layers:
        layer.mlp.down_proj.weight.data[:, 64:] = 0
        layer.self_attn.o_proj.weight.data[:, 32:] = 0
    half = info.space.uniform(info.model, heads=4, ffn_hidden_size=64)
    with torch.no_grad():
        for reference, net in ((hf, None), (masked, half)):
            with use_subnetwork(model, net):
                torch.testing.assert_close(gpt(tokens, positions, None), reference(tokens).logits, rtol=0, atol=1e-5)

    model.train()
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "position_ids": positions, "loss_mask": torch.ones(2, 16)}
    state = SimpleNamespace(train_state=SimpleNamespace(step=0))
    losses, loss_function = example.forward_step(elastic, state, iter([batch]), model)
    loss, tokens_counted, report = loss_function(losses)
    loss.backward()
    assert tokens_counted == 32 and list(report) == elastic.names
    assert float(loss) == pytest.approx(sum(float(value[0]) for value in report.values()), rel=1e-5)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in gpt.parameters())
