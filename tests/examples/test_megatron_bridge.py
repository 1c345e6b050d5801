"""examples/megatron_bridge: Bridge's `pretrain` has the losses of `flextron elastic`. docs/results/doors.md: what to install."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.doors import ElasticTraining
from flextron_mcore.runtime.unwrap import unwrap
from tests.examples.conftest import STEPS
from tests.stages.conftest import stage

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "megatron_bridge"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None, reason="Megatron-Bridge is not installed (docs/results/doors.md)"
)


def pretrain(*arguments: str) -> dict[int, list[float]]:
    """{iteration: losses of the full model and the sub-networks} of a run of Bridge, from its output."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    command = [sys.executable, str(FOLDER / "on_cpu.py"), *arguments]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if "consumed samples:" in line]
    return {
        int(re.search(r"iteration +(\d+)/", line)[1]): [float(x) for x in re.findall(r"loss: (\S+) \|", line)][:4]
        for line in lines
    }


def test_equals_our_loop_and_resumes(ours, tmp_path):
    run, rows = ours
    stage("export", f"checkpoint={run}/parent", f"out={tmp_path}/hf", "verify=false")
    arguments = [f"{tmp_path}/hf", f"{run}/sorted", f"{run}/data", str(STEPS)]
    undisturbed = pretrain(*arguments, f"{tmp_path}/bridge")
    assert len(undisturbed) == STEPS
    for row in rows:
        assert undisturbed[row["step"]] == pytest.approx([row["loss"], *row["subnetwork_losses"]], abs=1e-5)
    assert len(set(undisturbed[STEPS])) > 1  # losses differ, so the networks do
    resumed = pretrain(*arguments, f"{tmp_path}/resumed", f"{tmp_path}/bridge")  # from iteration 3
    assert resumed == {step: undisturbed[step] for step in range(4, STEPS + 1)}


def test_provider_and_forward_step(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    on_cpu = importlib.import_module("on_cpu")
    on_cpu.enable()
    example = importlib.import_module("train_elastic")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, vocab_size=128)
    hf = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).eval()
    hf.save_pretrained(tmp_path / "hf")
    stage("import", f"hf={tmp_path}/hf", f"out={tmp_path}/imported")
    info = open_checkpoint(tmp_path / "imported")
    elastic = ElasticTraining(info.model, info.space, count=3, seed=1234)
    provider = example.elastic_provider(str(tmp_path / "hf"), info, elastic, vocab_size=128, **on_cpu.IN_FP32)
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
