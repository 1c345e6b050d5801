"""README's commands, word for word, on a tiny model with 131,072 positions: every stage takes 4,096 tokens by default."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests import tokenizer_kinds
from tests.stages.conftest import stage

README = Path(__file__).parents[2] / "README.md"
POSITIONS = 131_072
LOOP = ["model.micro_batch_size=1", "model.global_batch_size=1", "trainer.max_steps=1", "trainer.limit_val_batches=1"]
# Keys that make a stage short. None sets the length of samples, which is what the test is about.
SHORT = {
    "importance": ["samples=2", "ablation_batches=1", "model.micro_batch_size=1"],
    "elastic": [*LOOP, "num_subnetworks=1", "validation_subnetworks=0"],
    "evaluate": ["limit_val_batches=1", "model.micro_batch_size=1"],
    "latency": ["rounds=1", "check_networks=2", "setting.batch_size=1"],
    "router": [*LOOP, "targets_per_step=1", "candidate_samples=1"],
    "joint": [*LOOP, "targets_per_step=1", "candidate_samples=1"],
    "select": ["budget=0.7 parameters", "measure=false"],  # a tiny model's latency hardly depends on its widths
}


def commands() -> list[tuple[str, list[str]]]:
    """(stage, keys) of README's chain on one's own model."""
    block = re.search(r"## With your own model\n\n```\n(.*?)```", README.read_text(), re.S)[1]
    lines = [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("flextron ")]
    return [(words[1], words[2:]) for words in lines]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with the model and the text that README names."""
    monkeypatch.chdir(tmp_path)
    tokenizer_kinds.save(tokenizer_kinds.llama3(), tmp_path / "Llama-3.2-1B")
    rope = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8)
    model = LlamaForCausalLM(
        LlamaConfig(
            **shape,
            vocab_size=512,
            max_position_embeddings=POSITIONS,
            rope_scaling={"rope_type": "llama3", **rope},
            rope_theta=500_000.0,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.save_pretrained(tmp_path / "Llama-3.2-1B")
    (tmp_path / "corpus" / "code").mkdir(parents=True)
    for number in range(40):
        (tmp_path / "corpus" / "code" / f"{number}.py").write_text(f"# file {number}\n{tokenizer_kinds.SOURCE}")
    rows = "".join(json.dumps({"text": f"{number}: {text}"}) + "\n" for number, text in enumerate(tokenizer_kinds.hard_texts()))
    (tmp_path / "corpus" / "web.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    return tmp_path


def test_commands_as_they_stand(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = commands()
    assert [name for name, _ in done][:5] == ["import", "prepare", "importance", "elastic", "evaluate"] and len(done) >= 11
    for name, keys in done:
        short = SHORT.get(name, [])
        given = {key.partition("=")[0] for key in short}
        stage(name, *(key for key in keys if key.partition("=")[0] not in given), *short)
        printed = capsys.readouterr().out
        if name in ("importance", "elastic", "evaluate", "router", "joint"):
            assert f"1 x 4096 tokens a forward pass (the model has {POSITIONS} positions); about " in printed, (name, printed)
        if name == "evaluate":
            assert 'next: flextron generate checkpoint=run/elastic "prompt=' in printed
    assert json.loads(Path("run/latency/metrics.json").read_text())["setting"]["prompt_length"] == 4096
    assert json.loads(Path("run/evaluate/metrics.json").read_text())["kv_cache"]["length"] == 4096
    assert Path("run/report/index.html").is_file()
