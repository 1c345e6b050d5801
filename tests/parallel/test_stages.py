"""Every stage gives the same results at several layouts of 2 and 4 processes as in one process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flextron_mcore.checkpoint.reader import TensorReader, load_model
from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.config import ModelConfig
from flextron_mcore.model import build_model, loaded_model
from flextron_mcore.runs.verification import verify
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.space import SKIPPED, ElasticSpace, SubNetwork
from tests import toy
from tests.parallel import probe
from tests.parallel.worker import chosen, run_jobs, torchrun
from tests.routing_toy import write_table
from tests.stages.conftest import stage

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
VIRTUAL, SEQUENCE = "virtual_pipeline_model_parallel_size", "sequence_parallel"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data": (2, {}),
    "tensor": (2, {TENSOR: 2}),
    "sequence": (2, {TENSOR: 2, SEQUENCE: True}),
    "pipeline": (2, {PIPELINE: 2}),
    "virtual": (2, {PIPELINE: 2, VIRTUAL: 2}),
    "tensor x pipeline": (4, {TENSOR: 2, PIPELINE: 2}),
    "data x virtual": (4, {PIPELINE: 2, VIRTUAL: 2}),
}
LAYOUTS = chosen(LAYOUTS, {"tensor", "sequence", "data x virtual"})
IMPORTED = [name for name in ("data", "data x virtual") if name in LAYOUTS]  # `import` has no layout: one a number of processes
# Layouts for the stages of routers, which only add broadcasts and sums over ranks: every kind of process group occurs once.
WITH_ROUTERS = [name for name in ("sequence", "tensor x pipeline", "data x virtual") if name in LAYOUTS]
DECODING = "tensor"  # generate supports tensor parallelism only
ADAPTIVE = ("router adaptive", "router adaptive surrogate")
EVALUATED = ("evaluate adaptive own", "evaluate adaptive full")
ROUTING = ("router", "router straight through", *ADAPTIVE, *EVALUATED, "joint", "sensitivity", "compare")
# (hidden size, executed layers) of networks that leave one of two pipeline stages without a layer.
SHALLOW = {"first": (8, (0, 1)), "last": (16, (3,))}
LOGITS = {"fp32": {}, "bf16": {"precision": "bf16"}, **{name: {"net": f"{{run}}/{name}.json"} for name in ("net", *SHALLOW)}}
AXES = dict(hidden_size=[8, 16, 32], depth=[1, 2, 4])
WEIGHTED = {"start": "first", "gpt2": "last"}  # {checkpoint: network of SHALLOW that is given as one-hot weights, too}
VOCAB = 301  # odd, so tensor-parallel ranks pad it


@dataclass
class Start:
    """A random checkpoint, and the stages' results from it in one process."""

    run: Path
    keys: dict[str, list[str]]  # {result: keys of its stage}
    prepared: list[str]
    net: SubNetwork

    def of_layout(self, name: str) -> list[dict[str, Any]]:
        """Jobs of a layout: every stage, logits of sub-networks, and networks with weighted candidates."""
        layout = LAYOUTS[name][1]
        options = [f"model.{key}={str(value).lower()}" for key, value in layout.items()]
        jobs: list[dict[str, Any]] = []
        for result, keys in self.keys.items():
            if (result in ROUTING and name not in WITH_ROUTERS) or ("generate" in result and name != DECODING):
                continue
            if result != "import":
                jobs.append({"stage": result.split()[0], "keys": [*keys, *options, f"out={self.run}/many/{name}/{result}"]})
            elif name in IMPORTED:
                jobs.append({"stage": "import", "keys": [*keys, f"out={self.run}/many/{name}/import"]})
            if result in EVALUATED:
                arguments = {"keys": [*keys, *options, f"out={self.run}/many/{name}/{result} as on a GPU"]}
                jobs.append({"call": "tests.parallel.probe:evaluate_as_on_a_gpu", "arguments": arguments})
        for case, more in LOGITS.items():
            more = {key: value.format(run=self.run) for key, value in more.items()}
            arguments = {"checkpoint": f"{self.run}/start", "layout": layout, "out": f"{self.run}/many/{name}/{case}", **more}
            jobs.append({"call": "tests.parallel.probe:logits", "arguments": arguments})
        for checkpoint, net in WEIGHTED.items():
            arguments = {"checkpoint": f"{self.run}/{checkpoint}", "net": f"{self.run}/{net}.json", "axes": AXES}
            jobs.append({"call": "tests.parallel.probe:weighted", "arguments": {**arguments, "layout": layout}})
        return [{**job, "layout": name} for job in jobs]


@pytest.fixture(scope="module")
def start(tmp_path_factory, text) -> Start:
    run = tmp_path_factory.mktemp("stages")
    prepared = [f"input=[{text}/code,{text}/prose]", "vocab_size=300", "valid_fraction=0.2"]
    stage("prepare", *prepared, f"out={run}/data")
    arch = toy.config(num_layers=4, num_attention_heads=8, num_query_groups=4, kv_channels=8, vocab_size=VOCAB)
    space = ElasticSpace.build(arch, granularity=2, heads=[0.5, 1.0], ffn_hidden_size=[0.25, 0.5, 1.0])
    toy.write(toy.model(arch, space), CheckpointInfo(arch, space), run / "start")
    net = toy.random_network(arch, space, 1)
    (run / "net.json").write_text(net.to_json())
    for name, (hidden, executed) in SHALLOW.items():
        layers = tuple(layer if i in executed else SKIPPED for i, layer in enumerate(net.layers))
        (run / f"{name}.json").write_text(SubNetwork(hidden, layers).to_json())
    gpt2 = ModelConfig(**{**arch.to_dict(), **toy.GPT2, "share_embeddings_and_output_weights": True})
    wide = ElasticSpace.build(gpt2, 2, "kv_group", space.heads, space.ffn_hidden_size, **AXES, layer_ranking=[3, 0, 1, 2])
    toy.write(toy.model(gpt2, wide), CheckpointInfo(gpt2, wide), run / "gpt2")
    torch.manual_seed(5)
    llama = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(run / "hf")
    AutoTokenizer.from_pretrained(run / "data" / "tokenizer").save_pretrained(run / "hf")
    checkpoint, data = f"checkpoint={run}/start", f"data={run}/data"
    train = ["model.micro_batch_size=2", "model.global_batch_size=8", "trainer.max_steps=3", "trainer.limit_val_batches=1"]
    train += ["exp_manager.create_tensorboard_logger=false", "exp_manager.checkpoint_callback_params.async_save=false"]
    table = write_table(run / "start", run / "latency.json", routed=True)
    router = [checkpoint, data, f"latency={table}", "targets_per_step=3", *train]
    text_keys = ["prompt=['def x(',import]", "max_new_tokens=6", f"tokenizer={run}/data/tokenizer"]
    adaptive = [f"checkpoint={run}/one/router", data, *train, "kind=adaptive", "targets_per_step=2"]
    adaptive += ["validation_targets=[0.8]", "adaptive.calibration_samples=8"]
    keys = {
        "import": [f"hf={run}/hf", "space.granularity=2", "space.heads=[0.5,1.0]"],
        "importance": [
            checkpoint,
            data,
            "samples=11",
            "model.micro_batch_size=4",
            "ablation_batches=1",
            "score.depth=mse",
            "score.ffn_hidden_size=activation_weight",
            "score.hidden_size=energy",
            *(f"space.{axis}={sizes}".replace(" ", "") for axis, sizes in AXES.items()),
            "layer_samples=7",
        ],
        "importance query heads": [
            *(checkpoint, data, "samples=11", "model.micro_batch_size=4", "ablation_batches=0"),
            *("space.attention_unit=query_head", "space.heads=[4,8]"),
        ],
        "evaluate": [checkpoint, data, "limit_val_batches=3", "model.micro_batch_size=3", "random=1"],
        "evaluate one sample": [
            checkpoint,
            data,
            "limit_val_batches=1",
            "model.micro_batch_size=1",
            f"subnetwork={run}/net.json",
        ],
        "router": [*router, "candidate_samples=4"],
        "router straight through": [*router, "surrogate.enabled=false", "candidate_samples=0"],
        "router adaptive": adaptive,
        "router adaptive surrogate": [*adaptive, "adaptive.surrogate=true", "surrogate.threshold=1e9"],
        **{
            result: [
                *(f"checkpoint={run}/one/router adaptive", data, "selector=adaptive", "budget=0.93", "limit_val_batches=2"),
                *("model.micro_batch_size=2", f"kv_policy={result.split()[-1]}"),
            ]
            for result in EVALUATED
        },
        "joint": [f"checkpoint={run}/one/router", data, *train, "targets_per_step=3"],
        "sensitivity": [checkpoint, data, "limit_val_batches=1", "model.micro_batch_size=2"],
        "compare": [
            *(f"checkpoint={run}/one/router", data, "selectors=[router,uniform,sensitivity,random]", "random_networks=3"),
            *("targets=[0.8]", "random_at_target=3", "limit_val_batches=1", "model.micro_batch_size=2"),
            f"sensitivity={run}/one/sensitivity",
        ],
        "generate": [checkpoint, *text_keys, f"subnetwork={run}/net.json"],
        "generate shallow": [f"checkpoint={run}/gpt2", *text_keys, f"subnetwork={run}/last.json"],
        "generate adaptive": [
            *(f"checkpoint={run}/one/router adaptive", *text_keys, "selector=adaptive", "budget=0.93", "kv_policy=own"),
            *("temperature=1", "top_k=20"),
        ],
        "export": [checkpoint, "max_shard_size=20000", "verify=true", f"subnetwork={run}/net.json"],
    }
    for result, wanted in keys.items():
        stage(result.split()[0], *wanted, f"out={run}/one/{result}")
    return Start(run, keys, prepared, net)


@pytest.fixture(scope="module")
def done(start, tmp_path_factory) -> dict[str, list[list[dict[str, Any]]]]:
    """{layout: [jobs][ranks] results and printed text}. The jobs of a number of processes share a torchrun."""
    found = {}
    for processes in (2, 4):
        names = [name for name, (needed, _) in LAYOUTS.items() if needed == processes]
        jobs = {name: start.of_layout(name) for name in names}
        results = iter(run_jobs(processes, [job for name in names for job in jobs[name]], tmp_path_factory.mktemp("jobs")))
        found |= {name: [next(results) for _ in jobs[name]] for name in names}
    return found


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def same_tensors(first: Path, second: Path) -> None:
    assert not verify(first).faults and not verify(second).faults
    a, b = TensorReader(open_checkpoint(first)), TensorReader(open_checkpoint(second))
    assert set(a.keys()) == set(b.keys()) and open_checkpoint(first) == open_checkpoint(second)
    for key in a.keys():
        assert a.dtype(key) == b.dtype(key) and torch.equal(a.read(key), b.read(key)), key


def same_files(first: Path, second: Path, but: tuple[str, ...] = ()) -> None:
    listed = [{p.relative_to(f): p for p in f.rglob("*") if p.is_file() and p.name not in but} for f in (first, second)]
    assert listed[0].keys() == listed[1].keys()
    for name, file in listed[0].items():
        assert file.read_bytes() == listed[1][name].read_bytes(), name


@pytest.mark.parametrize("name", IMPORTED)
def test_import_is_that_of_one_process(start, done, name):
    one, many = start.run / "one" / "import", start.run / "many" / name / "import"
    same_tensors(one, many)
    assert metrics(one) == metrics(many)
    same_files(one / "tokenizer", many / "tokenizer")
    writers = {file.name.split("_")[2] for file in many.rglob("*.distcp")}
    assert len(writers) == LAYOUTS[name][0]  # every rank wrote
    info = open_checkpoint(many)
    gpt = build_model(info.model, info.space, initialize=False)
    load_model(gpt, info)
    reader = TensorReader(info)
    for key, tensor in toy.memory_names(gpt).items():
        if "output_layer" not in key:
            assert torch.equal(tensor, reader.read(key)), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_importance_is_that_of_one_process(start, done, name):
    one, many = start.run / "one" / "importance", start.run / "many" / name / "importance"
    expected, found = load_file(one / "scores.safetensors"), load_file(many / "scores.safetensors")
    assert expected.keys() == found.keys()
    for key, scores in expected.items():
        torch.testing.assert_close(found[key], scores, rtol=1e-6, atol=0, msg=key)
    same_tensors(one, many)
    layers, others = metrics(one)["layers"], metrics(many)["layers"]
    assert others == {score: pytest.approx(values, rel=1e-5) for score, values in layers.items()} and len(layers) == 2
    assert "channels" in expected and len(metrics(one)["ablation"]) == 14
    for row, other in zip(metrics(one)["ablation"], metrics(many)["ablation"], strict=True):
        assert other == row | {key: pytest.approx(row[key], rel=1e-6) for key in ("loss", "perplexity")}
    assert not (many / "cache").exists()


@pytest.mark.parametrize("name", LAYOUTS)
def test_importance_of_query_heads_is_that_of_one_process(start, done, name):
    one, many = (start.run / folder / "importance query heads" for folder in ("one", f"many/{name}"))
    expected, found = load_file(one / "scores.safetensors"), load_file(many / "scores.safetensors")
    assert expected.keys() == found.keys() and expected["layers.0.heads"].shape == (4, 2)
    for key, scores in expected.items():
        torch.testing.assert_close(found[key], scores, rtol=1e-6, atol=0, msg=key)
    same_tensors(one, many)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("result", ["evaluate", "evaluate one sample"])
def test_evaluation_is_that_of_one_process(start, done, name, result):
    one, many = start.run / "one" / result, start.run / "many" / name / result
    expected, found = metrics(one)["networks"], metrics(many)["networks"]
    assert len(expected) == (1 if "one sample" in result else 4)
    for row, other in zip(expected, found, strict=True):
        assert other["name"] == row["name"] and other["subnetwork"] == row["subnetwork"]
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-6)
    assert not (many / "cache").exists()


@pytest.mark.parametrize("name", WITH_ROUTERS)
@pytest.mark.parametrize("result", ["router", "router straight through", "joint"])
def test_routers_are_those_of_one_process(start, done, name, result):
    """Losses, routers and choices are those of one process."""
    one, many = start.run / "one" / result, start.run / "many" / name / result
    expected, found = ([json.loads(row) for row in (run / "log.jsonl").read_text().splitlines()] for run in (one, many))
    for row, other in zip(expected, found, strict=True):
        assert other.keys() == row.keys()
        if row["event"] == "train":
            assert other["targets"] == row["targets"] and other["costs"] == row["costs"]
            assert other["subnetwork_losses"] == pytest.approx(row["subnetwork_losses"], rel=1e-5)
            assert other["constraint_loss"] == pytest.approx(row["constraint_loss"], rel=1e-3, abs=1e-5)
    routers = [load_file(open_checkpoint(run).path / "routers.safetensors") for run in (one, many)]
    for key, tensor in routers[0].items():
        torch.testing.assert_close(routers[1][key], tensor, rtol=1e-3, atol=1e-4, msg=key)
    assert metrics(many)["budgets"] == metrics(one)["budgets"]


@pytest.mark.parametrize("name", WITH_ROUTERS)
@pytest.mark.parametrize("result", ADAPTIVE)
def test_adaptive_routers(start, done, name, result):
    """Tokens get the levels that they get in one process, in training, calibration and evaluation; routers are equal, too."""
    one, many = (start.run / part / result for part in ("one", f"many/{name}"))
    expected, found = ([json.loads(row) for row in (run / "log.jsonl").read_text().splitlines()] for run in (one, many))
    for row, other in zip(expected, found, strict=True):
        if row["event"] == "train":
            assert other["targets"] == row["targets"] and other.keys() == row.keys()
            if "surrogate" in result:
                assert row["routers_follow_surrogate"]
                assert other["surrogate_error"] == pytest.approx(row["surrogate_error"], rel=1e-3)
            for key in ("subnetwork_losses", "costs"):
                torch.testing.assert_close(torch.tensor(other[key]), torch.tensor(row[key]), rtol=1e-5, atol=1e-6)
    routers = [load_file(open_checkpoint(run).path / "routers.safetensors") for run in (one, many)]
    for key, tensor in routers[0].items():
        torch.testing.assert_close(routers[1][key], tensor, rtol=1e-3, atol=1e-4, msg=key)
    for row, other in zip(metrics(one)["adaptive_budgets"], metrics(many)["adaptive_budgets"], strict=True):
        for policy, wanted in row["adaptive"].items():
            assert other["adaptive"][policy]["shares"] == pytest.approx(wanted["shares"], rel=1e-5)
            assert other["adaptive"][policy]["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


@pytest.mark.parametrize("name", WITH_ROUTERS)
@pytest.mark.parametrize("result", EVALUATED)
def test_tokens_that_choose(start, done, name, result):
    """Losses and spent costs of token routing are those of one process, also when computed as on a GPU."""
    expected = metrics(start.run / "one" / result)
    assert any(0 < max(block) < 1 for levels in expected["levels"].values() for block in levels)  # tokens have different levels
    for way in ("", " as on a GPU"):
        found = metrics(start.run / "many" / name / f"{result}{way}")
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["shares"] == pytest.approx(expected["shares"], rel=1e-5)


@pytest.mark.parametrize("name", WITH_ROUTERS)
def test_sensitivity_and_selectors_are_those_of_one_process(start, done, name):
    one, many = start.run / "one", start.run / "many" / name
    near = lambda row, *keys: row | {key: pytest.approx(row[key], rel=1e-6, abs=1e-5) for key in keys}  # noqa: E731
    for stage_, rows, keys in (("sensitivity", "blocks", ["degradation"]), ("compare", "networks", ["loss", "mean_loss"])):
        for row, other in zip(metrics(one / stage_)[rows], metrics(many / stage_)[rows], strict=True):
            assert other == near(row, "loss", *keys)


@pytest.mark.parametrize("result", ["generate", "generate shallow", "generate adaptive"])
def test_texts_are_those_of_one_process(start, done, result):
    one, many = (json.loads((start.run / part / result).read_text()) for part in ("one", f"many/{DECODING}"))
    for key in ("texts", "tokens", "subnetwork"):
        assert many.get(key) == one.get(key)
    assert ("share" in one) is ("share" in many) is ("adaptive" in result)
    if "share" in one:
        assert many["share"] == pytest.approx(one["share"], rel=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_exports_are_those_of_one_process(start, done, name):
    one, many = start.run / "one" / "export", start.run / "many" / name / "export"
    assert len(list(one.glob("*.safetensors"))) > 4
    same_files(one, many, but=("metrics.json", "config.yaml", "digests.json"))
    expected, found = metrics(one), metrics(many)
    assert found.pop("max_logit_difference") < 1e-5 and expected.pop("max_logit_difference") < 1e-5
    assert {**found, "path": None} == {**expected, "path": None}


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_one_process(start, done, name):
    info = open_checkpoint(start.run / "start")
    tokens, positions = toy.inputs(batch=3, vocab=VOCAB)
    (model,), (half,) = loaded_model(LayoutSettings(), info, "fp32"), loaded_model(LayoutSettings(), info, "bf16")
    with torch.no_grad():
        expected = {"fp32": model(tokens, positions, None), "bf16": half(tokens, positions, None)}
        for case in ("net", *SHALLOW):
            with use_subnetwork(model, SubNetwork.from_file(start.run / f"{case}.json")):
                expected[case] = model(tokens, positions, None)
    rounding = (expected["bf16"] - expected["fp32"]).abs().mean()
    assert (expected["net"] - expected["fp32"]).abs().mean() > 10 * rounding > 0
    for rank in range(LAYOUTS[name][0]):
        found = {case: torch.load(start.run / "many" / name / f"{case}.{rank}") for case in LOGITS}
        for case in ("fp32", "net", *SHALLOW):
            torch.testing.assert_close(found[case], expected[case], atol=1e-5, rtol=1e-5)
        assert found["bf16"].dtype == torch.float32 and (found["bf16"] - expected["fp32"]).abs().mean() < 2 * rounding
    for job, ranks in zip(start.of_layout(name), done[name], strict=True):
        case = Path(job.get("arguments", {}).get("out", "")).name
        if case in SHALLOW:  # skipped layers do not run on any rank
            assert {layer for rank in ranks for layer in rank["result"]} == set(SHALLOW[case][1])


@pytest.fixture(scope="module")
def weights(start) -> dict[str, Any]:
    """{checkpoint: result of probe.weighted in one process}."""
    return {
        checkpoint: probe.weighted(f"{start.run}/{checkpoint}", {}, AXES, f"{start.run}/{net}.json")
        for checkpoint, net in WEIGHTED.items()
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_of_candidates(start, done, weights, name):
    """Losses and gradients of weighted networks are equal on every rank; one-hot weights give the sub-network's loss."""
    jobs = zip(start.of_layout(name), done[name], strict=True)
    found = [ranks for job, ranks in jobs if job.get("call", "").endswith(":weighted")]
    for ranks, expected in zip(found, weights.values(), strict=True):
        assert expected["losses"][2] == pytest.approx(expected["losses"][3], rel=1e-5)
        for rank in ranks:
            torch.testing.assert_close(
                torch.tensor(rank["result"]["losses"]), torch.tensor(expected["losses"]), rtol=1e-5, atol=0
            )
            for network, others in zip(rank["result"]["gradients"], expected["gradients"], strict=True):
                for field, other in zip(network, others, strict=True):
                    torch.testing.assert_close(torch.tensor(field), torch.tensor(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_the_main_process_prints(start, done, name):
    for job in done[name]:
        main, *others = job
        assert all("result" in rank for rank in job), job
        assert not any(rank["printed"] for rank in others)
    printed = "".join(job[0]["printed"] for job in done[name])
    tables = {"imported": name in IMPORTED, "sorting, before any training": 1, "KV MiB": 2, "exported to": 1}
    tables |= {"networks that the routers choose": 3 * (name in WITH_ROUTERS), "with one smaller": name in WITH_ROUTERS}
    assert {title: printed.count(title) for title in tables} == tables


def test_import_and_prepare_by_the_command(start):
    """On two ranks: import, which starts process groups by itself, and prepare, which only the main process runs."""
    out = start.run / "command"
    finished = torchrun(2, "flextron_mcore", "import", *start.keys["import"], f"out={out}/import")
    assert finished.returncode == 0 and finished.stdout.count("imported") == 1, finished.stdout + finished.stderr
    same_tensors(start.run / "one" / "import", out / "import")
    finished = torchrun(2, "flextron_mcore", "prepare", *start.prepared, f"out={out}/data")
    assert finished.returncode == 0 and finished.stdout.count("prepared data") == 1, finished.stdout + finished.stderr
    same_files(start.run / "data", out / "data", but=("metrics.json", "config.yaml", "digests.json"))


def test_ranks_refuse_together(start, tmp_path):
    """Wrong input (an existing `out`, a layout that does not fit) is the same error on all ranks. The next job works."""
    out = f"out={start.run}/one/evaluate"
    layout = [f"model.{TENSOR}=2", "space.granularity=1"]
    jobs = [
        {"stage": "evaluate", "keys": [*start.keys["evaluate"], out]},
        {"stage": "export", "keys": [*start.keys["export"], out]},
        {"stage": "importance", "keys": [*start.keys["importance"], *layout, f"out={tmp_path}/out"]},
        {"call": "tests.parallel.probe:failing_output", "arguments": {"out": f"{tmp_path}/out", "ranks": [0, 1], "fatal": False}},
        {"call": "tests.parallel.probe:failing_output", "arguments": {"out": f"{tmp_path}/whole", "ranks": [], "fatal": False}},
    ]
    (tmp_path / "jobs").mkdir()
    *refused, whole = run_jobs(2, jobs, tmp_path / "jobs")
    texts = [job[0]["error"] for job in refused]
    assert all(job[1]["error"] == text for job, text in zip(refused, texts, strict=True))
    assert texts[0] == texts[1] and "exists already" in texts[0] and texts[3] == "bad input"
    assert f"model.{TENSOR}=2 does not divide space.granularity=1" in texts[2]
    assert whole[0] == whole[1] == {"result": None, "printed": ""}
    assert {p.name for p in tmp_path.iterdir()} == {"jobs", "whole"}
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {"config.yaml", "digests.json", "part0", "part1"}


def test_a_rank_that_fails_leaves_nothing_under_the_final_name(tmp_path):
    arguments = {"out": f"{tmp_path}/out", "ranks": [1], "fatal": True}
    (tmp_path / "jobs.json").write_text(json.dumps([{"call": "tests.parallel.probe:failing_output", "arguments": arguments}]))
    finished = torchrun(2, "tests.parallel.worker", str(tmp_path), timeout=120)
    assert finished.returncode != 0 and "ValueError: fatal" in finished.stderr
    assert not (tmp_path / "out").exists()


def test_two_processes_share_a_quickstart(start, tmp_path):
    """Two processes share the batches of a tiny quickstart, and the results are those of one process."""
    model = ["num_layers=2", "hidden_size=32", "num_attention_heads=4", "ffn_hidden_size=64", "max_position_embeddings=32"]
    training = ["trainer.max_steps=3", "trainer.val_check_interval=3", "trainer.limit_val_batches=1", "model.global_batch_size=8"]
    evaluation = ["data={out}/data", "limit_val_batches=1"]
    chain = {
        "data": start.prepared,
        "parent": ["model=tiny", "data={out}/data", *(f"model.{key}" for key in model), *training],
        "sorted": ["checkpoint={out}/parent", "data={out}/data", "samples=5", "ablation_batches=1"],
        "evaluate_before": ["checkpoint={out}/sorted", *evaluation],
        "elastic": ["checkpoint={out}/sorted", "data={out}/data", *training],
        "evaluate": ["checkpoint={out}/elastic", *evaluation],
        "latency": ["checkpoint={out}/elastic", "rounds=1", "check_networks=2", "setting.prompt_length=8"],
        "router": ["checkpoint={out}/elastic", "data={out}/data", "latency={out}/latency", *training, "candidate_samples=0"],
        "sensitivity": ["checkpoint={out}/router", *evaluation],
        "compare": ["checkpoint={out}/router", "sensitivity={out}/sensitivity", *evaluation, "random_at_target=2"],
        "joint": ["checkpoint={out}/router", "data={out}/data", *training],
        "adaptive": [
            *("kind=adaptive", "checkpoint={out}/router", "data={out}/data", *training),
            *("targets_per_step=1", "adaptive.calibration_samples=4"),
        ],
        "sorted_four": [
            *("checkpoint={out}/parent", "data={out}/data", "samples=5", "ablation_batches=1"),
            *("space.hidden_size=[0.5,1.0]", "space.depth=[1,2]"),
        ],
        "gumbel": ["checkpoint={out}/sorted_four", "data={out}/data", *training, "candidate_samples=0"],
        "family": ["checkpoint={out}/gumbel", *evaluation, "budgets=[0.75 parameters]"],
    }
    keys = [f"chain.{name}.keys={json.dumps(value)}" for name, value in chain.items()]
    stage("quickstart", *keys, f"out={tmp_path}/one")
    job = {"stage": "quickstart", "keys": [*keys, f"out={tmp_path}/two"]}
    first, again = run_jobs(2, [job, job], tmp_path)
    assert "result" in first[0] and "result" in again[0], [first, again]
    expected, found = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert found["parent_loss"] == pytest.approx(expected["parent_loss"], rel=1e-5)
    for row, other in zip(expected["networks"], found["networks"], strict=True):
        assert other["name"] == row["name"] and other["after"] == pytest.approx(row["after"], rel=1e-5)
    assert first[0]["printed"].count("== elastic:") == 1 and again[0]["printed"].count(": complete") == 20
    assert not first[1]["printed"] and not again[1]["printed"]
    assert (tmp_path / "two" / "report" / "index.html").is_file() and (
        tmp_path / "two" / "export_mixed" / "config.json"
    ).is_file()
