"""Every text format that the product reads, changed at random: a reader returns, or says in one line what is wrong."""

from __future__ import annotations

import copy as copies
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flextron_mcore.checkpoint.hf import import_hf, open_hf
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import open_data
from flextron_mcore.data.prepare import prepare_data
from flextron_mcore.data.tokenizer import open_tokenizer, read_vocabulary
from flextron_mcore.exports.directory import take_tokenizer
from flextron_mcore.exports.gguf.tokenizer import read as read_gguf_tokenizer
from flextron_mcore.latency.measurements import read_measurements
from flextron_mcore.latency.table import LatencyTable
from flextron_mcore.latency.trtllm_bench import measurements
from flextron_mcore.launch.follow import Record, _progress, read_record, write_record
from flextron_mcore.report import TOPICS, build_report
from flextron_mcore.routers.static import StaticRouters
from flextron_mcore.routers.store import RouterInfo, read_routers, write_routers
from flextron_mcore.runs.choice import _degradations
from flextron_mcore.runs.inputs import _stage_of
from flextron_mcore.runs.resume import _read_config
from flextron_mcore.settings.compose import compose, read, to_yaml
from flextron_mcore.space import SubNetwork
from tests.hostile.conftest import WAIT
from tests.latency.test_table import ARCH, SPACE, table
from tests.report import synthetic

EXAMPLES = int(os.environ.get("FLEXTRON_EXAMPLES", "25"))  # changed files of each format


@dataclass(frozen=True)
class Format:
    """Kind of file. make: function that writes a good one, from the inputs into a directory, and returns it. open: reads it."""

    make: Callable[[Path, Path], Path]
    open: Callable[[Path], object]


def kept(name: str) -> Callable[[Path, Path], Path]:
    """`make` of a file of the inputs: hard-links the inputs' directory into an empty one, and copies the file, to change it."""

    def make(inputs: Path, folder: Path) -> Path:
        top = inputs / name.partition("/")[0]
        for file in top.rglob("*"):
            place = folder / top.name / file.relative_to(top)
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.is_file():
                os.link(file, place)
        file = folder / name
        text = file.read_bytes()
        file.unlink()
        file.write_bytes(text)
        return file

    return make


def written(name: str, content: Callable[[Path], str]) -> Callable[[Path, Path], Path]:
    """`make` of a file whose content follows from the inputs."""

    def make(inputs: Path, folder: Path) -> Path:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content(inputs))
        return file

    return make


def made_routers(inputs: Path, folder: Path) -> Path:
    info = open_checkpoint(inputs / "run")
    choices = Choices(info.model, info.space)
    torch.manual_seed(0)
    description = RouterInfo(("parameters",), ((0.3, 1.0),), 8, {"dtype": "fp32", "batch_size": 1, "length": 8})
    write_routers(folder, description, StaticRouters(choices, 1, 8), None)
    (folder / "run").symlink_to(inputs / "run")
    return folder / "routers.json"


def open_routers(file: Path) -> None:
    info = open_checkpoint(file.parent / "run")
    read_routers(file.parent, Choices(info.model, info.space))


def made_sensitivity(inputs: Path) -> str:
    choices = Choices(ARCH, SPACE)
    rows = [
        {"layer": layer, "axis": axis, "size": size, "degradation": 0.1}
        for (layer, axis), sizes in zip(choices.blocks, choices.sizes, strict=True)
        for size in sizes
    ]
    return json.dumps({"model": ARCH.to_dict(), "space": SPACE.to_dict(), "blocks": rows})


def open_sensitivity(file: Path) -> None:
    chosen = compose("select", ["checkpoint=x", "budget=0.5", f"sensitivity='{file}'"])
    _degradations(chosen, Choices(ARCH, SPACE))


def made_metrics(inputs: Path) -> str:
    return json.dumps({**synthetic.EVALUATE, "warnings": ["w"], **synthetic.SETTINGS})


def report(file: Path) -> None:
    out = file.parents[1] / "report"
    out.mkdir(exist_ok=True)
    build_report(file.parents[1], out, TOPICS)


def made_log(inputs: Path, folder: Path) -> Path:
    (folder / "a").mkdir()
    (folder / "a" / "metrics.json").write_text(json.dumps(synthetic.ELASTIC))
    file = folder / "a" / "log.jsonl"
    row = {"event": "train", "step": 1, "loss": 2.0, "tokens_per_second": 9.0, "seconds": 1.0}
    valid = {"event": "validation", "step": 2, "losses": {"prose": 2.0}}
    file.write_text("".join(json.dumps(each) + "\n" for each in (row, valid)))
    return file


def made_record(inputs: Path, folder: Path) -> Path:
    (folder / "launch").mkdir()
    write_record(folder, [Record("x", "elastic", "1", "logs", 3)])
    return folder / "launch" / "jobs.json"


def made_bench(inputs: Path, folder: Path) -> Path:
    (folder / "metrics.json").write_text(json.dumps({"subnetwork": SubNetwork.full(ARCH).to_dict()}))
    (folder / "bench.json").write_text(json.dumps({"performance": {"avg_request_latency_ms": 2.0}}))
    return folder / "bench.json"


def open_hf_config(file: Path) -> None:
    import_hf(file.parent)


def open_tokenizer_files(file: Path) -> None:
    read_vocabulary(file.parent)
    target = file.parents[1] / "taken"
    target.mkdir(exist_ok=True)
    take_tokenizer(file.parent, target)
    opened = open_tokenizer(file.parent)
    opened.decode(opened.encode_batch(["a text"])[0])


def open_corpus(file: Path) -> None:
    out = file.parent / "prepared"
    out.mkdir()
    prepare_data({"text": [file]}, out, tokenizer=file.parent / "tokenizer", valid_fraction=0.5)


def made_corpus(inputs: Path, folder: Path) -> Path:
    (folder / "tokenizer").symlink_to(inputs / "data" / "tokenizer")
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"words {i}"}) + "\n" for i in range(4)))
    return file


def open_recipe(file: Path) -> None:
    compose("pretrain", ["data=x", "out=y", "model=mine"], [file.parents[1]])


RECIPE = """# @package _global_
model:
  num_layers: 2
  hidden_size: 8
  num_attention_heads: ${model.num_layers}
  max_position_embeddings: 16
"""
FORMATS = {
    "sub-network": Format(written("net.json", lambda root: SubNetwork.full(ARCH).to_json()), SubNetwork.from_file),
    "checkpoint": Format(kept("run/checkpoints/iter_0000000/flextron.json"), lambda file: open_checkpoint(file.parent)),
    "routers": Format(made_routers, open_routers),
    "latency table": Format(
        written("latency.json", lambda root: json.dumps(table().to_dict())),
        lambda file: LatencyTable.from_file(file, ARCH, SPACE).warning(),
    ),
    "measurements": Format(
        written("m.json", lambda root: json.dumps([{"subnetwork": SubNetwork.full(ARCH).to_dict(), "ms": 1.5}])),
        lambda file: read_measurements(file, ARCH, SPACE),
    ),
    "trtllm-bench": Format(made_bench, lambda file: measurements([file.parent])),
    "sensitivity": Format(written("metrics.json", made_sensitivity), open_sensitivity),
    "data": Format(kept("data/data.json"), lambda file: open_data(file.parent)),
    "tokenizer": Format(kept("data/tokenizer/tokenizer.json"), open_tokenizer_files),
    "tokenizer_config": Format(kept("data/tokenizer/tokenizer_config.json"), open_tokenizer_files),
    "tokenizer for gguf": Format(kept("data/tokenizer/tokenizer.json"), lambda file: read_gguf_tokenizer(file.parent, 300)),
    "hf config": Format(kept("hf/config.json"), open_hf_config),
    "hf index": Format(
        lambda inputs, folder: made_index(inputs, folder),
        lambda file: open_hf(file.parent),
    ),
    "config of a run": Format(
        written("config.yaml", lambda root: to_yaml(compose("pretrain", ["data=x", "out=y"]))),
        lambda file: (_read_config(file), _stage_of(file.parent)),
    ),
    "--config": Format(
        written("config.yaml", lambda root: to_yaml(compose("pretrain", ["data=x", "out=y"]))),
        lambda file: read("pretrain", file),
    ),
    "--config of launch": Format(
        written("config.yaml", lambda root: to_yaml(compose("launch", ["cluster.account=x", "data=y", "stages=[pretrain]"]))),
        lambda file: read("launch", file),
    ),
    "recipe": Format(
        written("model/mine.yaml", lambda root: RECIPE),
        open_recipe,
    ),
    "metrics": Format(written("a/metrics.json", made_metrics), report),
    "log": Format(made_log, report),
    "log of a job": Format(made_log, lambda file: _progress(file.parent, Record("x", "elastic", "1", "logs", 3))),
    "jobs": Format(made_record, lambda file: read_record(file.parents[1])),
    "text": Format(made_corpus, open_corpus),
}


def made_index(inputs: Path, folder: Path) -> Path:
    kept("hf/config.json")(inputs, folder)
    weights = folder / "hf" / "model.safetensors"
    weights.rename(weights.with_name("a.safetensors"))
    with weights.with_name("a.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    file = folder / "hf" / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {name: "a.safetensors" for name in header if name != "__metadata__"}}))
    return file


VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "1", "../x", "a\0b"),
    *("${oc.env:HOME}", "${nothing}", "${", "???", "é", "\u202e", "<b>", "x" * 5000),
    *([], {}, [[]], [None], [1, "x"], {"": None}, {"a": {"b": []}}, [0] * 100),
)


PIECES = (
    *(b"", b"\0", b"\xff", b"{", b"]", b'"', b"\n", b"- ", b": ", b"&a ", b"*a", b"\t", b"#", b"NaN", b"1e999", b"\\ud800"),
    *(b"9" * 5000, b"[" * 2000, b"!!int ''", b"!!python/name:os.x", b"!!timestamp x", b"2001-01-01", b"${oc.env:HOME}"),
)


def places(value: Any) -> list[tuple]:
    """Paths of all values below a value."""
    found: list[tuple] = [()]
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += [(key, *rest) for rest in places(child)][:40]
    return found


@st.composite
def changes(draw: st.DrawFn, value: Any) -> Any:
    """The value with one to three of its parts replaced, removed, renamed or added."""
    value = copies.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(value)))
        new = copies.deepcopy(draw(st.sampled_from(VALUES)))
        if not place:
            if draw(st.integers(0, 9)) == 0:
                return new
            continue
        parent = value
        for key in place[:-1]:
            parent = parent[key]
        what, key = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "wrap"])), place[-1]
        if what == "replace":
            parent[key] = new
        elif what == "remove":
            del parent[key]
        elif what == "wrap":
            parent[key] = draw(st.sampled_from([[parent[key]], {"x": parent[key]}, str(parent[key])]))
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(["x", "", "a.b", "é", "digest", "files", "format"]))] = new
        else:
            parent.append(new)
    return value


@st.composite
def spoilt(draw: st.DrawFn, text: bytes, name: str) -> bytes:
    """A file's bytes with values or bytes changed."""
    values = None
    if draw(st.booleans()):
        if name.endswith(".jsonl"):
            rows = [json.loads(line) for line in text.splitlines()]
            return "".join(json.dumps(draw(changes(row))) + "\n" for row in rows).encode()
        values = yaml.safe_load(text) if name.endswith(".yaml") else json.loads(text)
        values = draw(changes(values))
        made = yaml.safe_dump(values, allow_unicode=True) if name.endswith(".yaml") else json.dumps(values)
        return made.encode()
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(text) - 1)))
        end = min(len(text), start + draw(st.sampled_from([0, 1, 1, 2, 8, 100, len(text)])))
        text = text[:start] + draw(st.sampled_from(PIECES)) + text[end:]
    return text


@pytest.mark.parametrize("name", FORMATS)
def test_a_line_or_nothing(inputs, tmp_path_factory, name):
    root = tmp_path_factory.mktemp("spoilt")
    form = FORMATS[name]
    start = root / "start"
    start.mkdir()
    good = form.make(inputs, start)
    form.open(good)  # the unchanged file can be read
    text, count = good.read_bytes(), iter(range(10**9))

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize="FLEXTRON_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(spoilt(text, good.name))
    def check(data: bytes) -> None:
        signal.alarm(WAIT)
        folder = root / str(next(count))
        folder.mkdir()
        file = form.make(inputs, folder)
        file.write_bytes(data)
        try:
            form.open(file)
        except FlextronError as error:
            assert str(error).strip() and len(" ".join(str(error).split())) < 6000

    check()
