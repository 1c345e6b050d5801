"""The whole report of a synthetic run directory, whose files have the form that the stages write."""

from __future__ import annotations

import base64
import json
import math
import random
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.report import TOPICS, build_report
from flextron_mcore.report.topic import Highlights, Section, Topic
from flextron_mcore.space import ElasticSpace, LayerChoice, SubNetwork, count_parameters, kv_cache_bytes, weight_bytes
from tests.report import synthetic
from tests.report.synthetic import ELASTIC, EVALUATE, write

MODEL = ModelConfig(8, 256, 8, 8192, 512, ffn_hidden_size=1024)
SPACE = ElasticSpace.build(MODEL, granularity=2)
DOMAINS = {"prose": 0.15, "code": -0.25, "tables": 0.1}
SETTINGS = {"model": MODEL.to_dict(), "space": SPACE.to_dict()}


def networks() -> dict[str, SubNetwork]:
    """The full model, uniform networks, and random ones; one of them skips two layers."""
    rng, nets = random.Random(1), {"full": SubNetwork.full(MODEL)}
    for h, f in ((8, 512), (4, 1024), (6, 768), (4, 512), (4, 256), (2, 512), (2, 256)):
        nets[f"uniform {100 * h // 8}% heads {100 * f // 1024}% ffn"] = SPACE.uniform(MODEL, h, f)
    for i in range(4):
        layers = tuple(LayerChoice(True, rng.choice(SPACE.heads), 1, rng.choice(SPACE.ffn_hidden_size)) for _ in range(8))
        nets[f"random {i + 1}"] = SubNetwork(256, layers)
    full, skipped = LayerChoice(True, 8, 1, 1024), LayerChoice(False, 8, 1, 1024)
    nets["two layers skipped"] = SubNetwork(256, (full, full, full, skipped, skipped, full, full, full))
    return nets


def loss_of(net: SubNetwork, trained: bool) -> float:
    """Made-up loss: higher for smaller networks, and lost FFN neurons cost more than lost heads."""
    used = [(layer.num_attention_heads / 8, layer.ffn_hidden_size / 1024) for layer in net.layers if layer.executed]
    share = sum(0.3 * heads + 0.7 * ffn**0.8 for heads, ffn in used) / 8
    return 3.1 + 0.55 * (1 - share) if trained else 3.15 + 4.2 * (1 - share) ** 0.7


def evaluation(trained: bool) -> dict[str, Any]:
    rows = []
    for name, net in networks().items():
        per_domain = {domain: loss_of(net, trained) + shift for domain, shift in DOMAINS.items()}
        mean = sum(per_domain.values()) / len(per_domain)
        rows.append(
            {
                "name": name,
                "subnetwork": net.to_dict(),
                "parameters": count_parameters(MODEL, net),
                "non_embedding_parameters": count_parameters(MODEL, net, embeddings=False),
                "weight_bytes": weight_bytes(MODEL, net),
                "kv_cache_bytes": kv_cache_bytes(MODEL, net, 1, 512),
                "loss": per_domain,
                "perplexity": {domain: math.exp(value) for domain, value in per_domain.items()},
                "mean": {"loss": mean, "perplexity": math.exp(mean)},
                "something_new": 1,
            }
        )
    return {"stage": "evaluate", "networks": rows, **SETTINGS}


def training(kind: str, steps: int = 300) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng, rows = random.Random(kind), []
    elastic, start = kind == "elastic", 3.2 if kind == "elastic" else 9.0
    full_at = lambda step: 3.1 + (start - 3.1) * math.exp(-step / 60)  # noqa: E731
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "event": "train",
            "loss": full_at(step) + rng.gauss(0, 0.06),
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
        }
        if elastic:
            row["subnetwork_losses"] = [
                full_at(step) + 0.4 + 2.5 * math.exp(-step / 40) + abs(rng.gauss(0, 0.25)) for _ in range(3)
            ]
        rows.append(row)
        if step == 1 or step % 30 == 0:
            nets = networks() if elastic else {"full": SubNetwork.full(MODEL)}
            fade = math.exp(-step / 50)
            losses = {
                n: full_at(step) + (1 - fade) * (loss_of(v, True) - 3.1) + fade * (loss_of(v, False) - 3.15)
                for n, v in nets.items()
            }
            rows.append({"step": step, "event": "validation", "losses": losses})
    ends = [row["losses"] for row in rows if row["event"] == "validation"]
    metrics = {"stage": kind, "steps": steps, "tokens": steps * 16384, "seconds": 412.4, "tokens_per_second": 11918.5, **SETTINGS}
    return {**metrics, "validation": {"first": ends[0], "last": ends[-1]}}, rows


def ablation() -> dict[str, Any]:
    full, heads, ffn = "full (baseline)", "4 of 8 heads", "512 of 1024 FFN neurons"
    cells = ((full, "unsorted", 3.15), (heads, "unsorted", 4.02), (ffn, "unsorted", 5.9))
    cells += ((full, "sorted", 3.15), (heads, "sorted", 3.58), (ffn, "sorted", 4.47))
    rows = [{"setup": s, "order": o, "loss": v, "perplexity": math.exp(v), "score": "activation"} for s, o, v in cells]
    return {"stage": "importance", "samples": 512, "score": "activation", "ablation": rows}


def make_run(run: Path) -> Path:
    """A run with every stage, and one of a command that the report does not know."""
    sizes = {
        "prose": (3_500_000, 35_000, 812, 14_681_233),
        "code": (6_100_000, 61_000, 1_204, 22_020_911),
        "tables": (900_000, 9_000, 77, 1_999_001),
    }
    keys = ("train_tokens", "valid_tokens", "documents", "bytes")
    domains = {name: dict(zip(keys, values, strict=True)) for name, values in sizes.items()}
    write(run / "data", {"stage": "prepare", "vocab_size": 8192, "domains": domains})
    write(run / "pretrain", *training("pretrain"))
    write(run / "importance", ablation())
    write(run / "elastic", *training("elastic"))
    write(run / "evaluate_parent", evaluation(trained=False))
    write(run / "evaluate", evaluation(trained=True))
    write(run / "latency", {"stage": "latency", "blocks": []})
    for name, net in list(networks().items())[:2]:
        size = {"parameters": count_parameters(MODEL, net), "bytes": 2 * count_parameters(MODEL, net) + 4321}
        export = {"stage": "export", "format": "hf", "architecture": "LlamaForCausalLM", "path": str(run.resolve() / "export")}
        write(run / f"export_{name.split()[0]}", {**export, **size, "max_logit_difference": 3.1e-6 if name == "full" else None})
    return run


class Page(HTMLParser):
    """HTML page of a report, parsed for the parts that the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self._cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == first)

    def sections(self) -> list[str | None]:
        return [attrs.get("id") for tag, attrs in self.tags if tag == "section"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Page]:
    run, out = make_run(tmp_path_factory.mktemp("whole") / "my_run"), tmp_path_factory.mktemp("out")
    result = build_report(run, out, TOPICS)
    text = result["index"].read_text(encoding="utf-8")
    return result, text, Page(text)


def test_family_table_has_every_network_with_its_numbers(built):
    _, _, page = built
    head = page.row("Network")
    for name, net in networks().items():
        cells = dict(zip(head, page.row(name), strict=True))
        assert cells["Parameters"] == f"{count_parameters(MODEL, net):,}"
        assert cells["% of full"] == f"{100 * count_parameters(MODEL, net) / count_parameters(MODEL):.1f}%"
        assert float(cells["Mean loss"]) == pytest.approx(loss_of(net, True), abs=6e-4)
        assert cells["Mean loss before"] == f"{loss_of(net, False):.3f}"
        assert cells["Loss, code"] == f"{loss_of(net, True) - 0.25:.3f}"
        assert cells["Perplexity"] == f"{math.exp(loss_of(net, True)):.2f}"
        assert cells["Weights (MiB)"] == f"{weight_bytes(MODEL, net) / 2**20:.2f}"
        assert cells["KV cache (MiB)"] == f"{kv_cache_bytes(MODEL, net, 1, 512) / 2**20:.2f}"
    smallest = dict(zip(head, page.row("uniform 25% heads 25% ffn"), strict=True))
    assert (smallest["Heads of 8"], smallest["FFN of 1,024"], smallest["Layers of 8"]) == ("2", "256", "8")
    assert dict(zip(head, page.row("two layers skipped"), strict=True))["Layers of 8"] == "6"


def test_summary_has_the_key_figures(built):
    _, _, page = built
    full, least = networks()["full"], networks()["uniform 25% heads 25% ffn"]
    assert f"The full model has a mean loss of {loss_of(full, True):.3f} nats per token" in page.text
    assert f"its parent, before elastic training, had {loss_of(full, False):.3f}." in page.text
    assert f"a mean loss of {loss_of(least, True):.3f}, down from {loss_of(least, False):.3f} before training." in page.text
    assert "The smallest of its 12 sub-networks, uniform 25% heads 25% ffn, has 50.0% of the parameters" in page.text


def test_other_tables(built):
    _, _, page = built
    assert page.sections() == ["data", "sorting", "training", "family", "pareto", "widths", "exports"]
    assert ["512 of 1024 FFN neurons", "sorted", "activation", "4.470", "87.36"] in page.rows
    assert page.row("code") == ["code", "6,100,000", "61,000", "1,204", "21.00", "3.57"]
    assert page.row("elastic")[:5] == ["elastic", "300", "4,915,200", "6 min 52 s", "11,918"]
    assert page.row("export_full")[3:] == ["12,587,264", "24.01", "3.1e−6"]
    assert page.row("export_uniform")[-1] == "not measured"
    assert ["ffn_hidden_size", "256, 512, 768, 1024"] in page.rows


def test_page_loads_nothing_from_outside(built):
    _, text, page = built
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    sources = [attrs[key] for _, attrs in page.tags for key in ("src", "srcset", "href") if attrs.get(key)]
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    anchors = {source[1:] for source in sources if source.startswith("#")}
    chapters = {attrs["id"] for tag, attrs in page.tags if tag == "h2"}
    assert anchors == {*page.sections(), *chapters} and chapters == {f"chapter-{key}" for key in ("trained", "budgets", "next")}
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(set(ids)) == len(ids)


def test_figures_are_files_and_on_the_page_with_a_description(built):
    result, text, page = built
    assert {path.stem for path in result["figures"]} == {
        *("pareto", "pareto_family", "layer_widths", "sorting", "pretrain_training", "elastic_training"),
        *("elastic_validation_uniform", "elastic_validation_random", "elastic_validation_other"),
    }
    for path in result["figures"]:
        assert path.read_bytes().startswith(b"\x89PNG\r\n")
        assert base64.b64encode(path.read_bytes()).decode() in text
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 2 * len(result["figures"])
    assert all(len(image["alt"] or "") > 40 for image in images)


def test_family_json_round_trips(built):
    result, _, _ = built
    values = json.loads((result["index"].parent / "family.json").read_text(encoding="utf-8"))
    model = ModelConfig.from_dict(values["model"])
    assert model == MODEL and ElasticSpace.from_dict(model, values["space"]) == SPACE
    assert result["family"] == len(values["family"]) == len(values["before"]) == len(networks())
    given = {row["name"]: {k: v for k, v in row.items() if k != "something_new"} for row in evaluation(trained=True)["networks"]}
    sizes = {
        name: {"hidden_size": net.hidden_size, "depth": sum(layer.executed for layer in net.layers)}
        for name, net in networks().items()
    }
    assert {row["name"]: row for row in values["family"]} == {name: {**row, **sizes[name]} for name, row in given.items()}
    assert sizes["two layers skipped"]["depth"] == 6 and values["budgets"] == {}
    assert {row["name"]: SubNetwork.from_dict(row["subnetwork"]) for row in values["before"]} == networks()


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (["data"], ["data"]),
        (["pretrain"], ["training"]),
        (["importance"], ["sorting"]),
        (["evaluate"], ["family", "pareto", "widths"]),
        (["elastic", "export_full"], ["training", "exports"]),
    ],
)
def test_a_run_of_some_stages_gives_their_parts(tmp_path, undrawn, stages, expected):
    whole, run = make_run(tmp_path / "whole"), tmp_path / "run"
    for stage in stages:
        shutil.copytree(whole / stage, run / stage)
    result = build_report(run, tmp_path / "out", TOPICS)
    page = Page(result["index"].read_text(encoding="utf-8"))
    assert page.sections() == expected
    assert result["family"] == (13 if "evaluate" in stages else 0)
    values = json.loads((tmp_path / "out" / "family.json").read_text(encoding="utf-8"))
    assert values["before"] is None and len(values["family"]) == result["family"]
    assert "before training" not in page.text and "Mean loss before" not in page.text


def test_a_single_stage_directory_is_a_run(tmp_path):
    write(tmp_path / "only", ablation())
    assert Page(build_report(tmp_path / "only", tmp_path / "out", TOPICS)["index"].read_text(encoding="utf-8")).sections() == [
        "sorting"
    ]


def test_text_from_inputs_is_escaped(tmp_path, undrawn):
    evil, values = '<script>alert("x")</script> $x_{$', evaluation(trained=True)
    values["networks"] = values["networks"][-3:]
    values["networks"][0]["name"] = evil
    values["networks"][1]["loss"]["<img src=x onerror=y>"] = 1.0
    write(tmp_path / "run" / "evaluate", values)
    text = build_report(tmp_path / "run", tmp_path / "out", TOPICS)["index"].read_text(encoding="utf-8")
    assert "<script" not in text and "<img src=x" not in text
    assert "&lt;script&gt;alert(" in text
    assert Page(text).row(evil) and "Loss, <img src=x onerror=y>" in Page(text).row("Network")


def test_a_warning_stands_once_where_the_figures_of_its_stage_are(tmp_path, undrawn):
    metrics, log = synthetic.routing(steps=5)
    write(tmp_path / "run" / "router", {**metrics, "warnings": ["budgets <b>only</b>"]}, log)
    write(tmp_path / "run" / "evaluate", EVALUATE)
    text = build_report(tmp_path / "run", tmp_path / "out", TOPICS)["index"].read_text(encoding="utf-8")
    warning = "Warning of router: budgets &lt;b&gt;only&lt;/b&gt;"
    budgets = text.index('<section id="budgets">')
    assert text.count(warning) == 1 and budgets < text.index(warning) < text.index("</section>", budgets)
    assert "budgets only" in Page(text).row("router")  # the table says what the routers learned from


def test_stages_without_a_result_are_named(tmp_path, undrawn):
    run = tmp_path / "run"
    write(run / "evaluate", EVALUATE)
    assert "Not finished" not in build_report(run, tmp_path / "out", TOPICS)["index"].read_text(encoding="utf-8")
    chain = {name: {"stage": "export"} for name in ("evaluate", "export_half", "export_full")}
    (run / "config.yaml").write_text(json.dumps({"stage": "quickstart", "chain": {**chain, "report": {"stage": "report"}}}))
    (run / ".export_half.tmp").mkdir()
    (run / ".report.tmp").mkdir()
    (run / "elastic").mkdir()
    (run / "elastic" / "config.yaml").write_text("stage: elastic\ntrainer: {max_steps: 600}")
    (run / "elastic" / "log.jsonl").write_text('{"step": 119}\n{"step": 120}\n{"st')
    (run / "broken").mkdir()
    (run / "broken" / "config.yaml").write_text("stage: [")
    page = Page(build_report(run, run / "here", TOPICS)["index"].read_text(encoding="utf-8"))
    lines = ["export_half: no result yet.", "export_full: not begun.", "elastic: step 120 of 600."]
    assert [line for line in page.text.splitlines() if line.endswith(".") and ": " in line and line in lines] == lines
    assert "broken" not in page.text and "report: no" not in page.text and "evaluate: " not in page.text


def test_diverged_networks_are_shown_and_json_stays_strict(tmp_path):
    values = evaluation(trained=True)
    values["networks"] = values["networks"][:8]
    values["networks"][1]["mean"] = {"loss": math.nan, "perplexity": math.inf}
    write(tmp_path / "run" / "evaluate", values)
    result = build_report(tmp_path / "run", tmp_path / "out", TOPICS)
    row = Page(result["index"].read_text(encoding="utf-8")).row(values["networks"][1]["name"])
    assert row[2:4] == ["NaN", "∞"]
    refuse = lambda constant: pytest.fail(f"{constant} is not JSON")  # noqa: E731
    found = json.loads((tmp_path / "out" / "family.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert [row["mean"]["loss"] for row in found["family"]].count(None) == 1


def test_gumbel_and_family_are_parts_of_the_page(tmp_path, undrawn):
    write(tmp_path / "run" / "gumbel", *synthetic.gumbel(steps=5))
    write(tmp_path / "run" / "family", synthetic.family())
    page = Page(build_report(tmp_path / "run", tmp_path / "out", TOPICS)["index"].read_text(encoding="utf-8"))
    assert page.sections() == ["routers", "budgets", "models"]
    assert "Training of model and router took 5 steps" in page.text
    (rows,) = json.loads((tmp_path / "out" / "family.json").read_text(encoding="utf-8"))["budgets"].values()
    assert [(row["budget"], row["hidden_size"], row["depth"]) for row in rows][:2] == [("0.6", 128, 4), ("0.7", 192, 6)]


def test_what_routers_reach_joins_the_summary_and_its_parts_the_page(tmp_path, undrawn):
    run = make_run(tmp_path / "run")
    for name, made in (("router", synthetic.routing()), ("joint", synthetic.routing("joint", False))):
        write(run / name, *made)
    write(run / "sensitivity", synthetic.sensitivity())
    write(run / "compare", synthetic.compare())
    page = Page(build_report(run, tmp_path / "out", TOPICS)["index"].read_text(encoding="utf-8"))
    trained, budgets = ["data", "sorting", "training", "routers"], ["budgets", "family", "pareto", "widths"]
    assert page.sections() == [*trained, *budgets, "random", "compare", "equal", "scaling", "sensitivity", "exports"]
    assert "The smallest of its 12 sub-networks" in page.text and "Asked for 60% of the full model’s latency" in page.text
    heads = [row[0] for row in page.rows]
    assert heads.count("joint") == 2 and heads.count("elastic") == 2  # in the table of their section, and among the stages


@pytest.mark.parametrize(
    ("stage", "made", "expected", "summary"),
    [
        (
            "router",
            synthetic.routing(),
            ["routers", "budgets"],
            "Router training took 300 steps, 2.46 million tokens and 1 min 1 s.",
        ),
        ("joint", synthetic.routing("joint", False), ["routers", "budgets"], "model’s validation loss went from 2.999 to 2.905"),
        ("compare", (synthetic.compare(),), ["random", "compare", "equal", "scaling"], "Asked for 60% of"),
        ("sensitivity", (synthetic.sensitivity(),), ["sensitivity"], "this run holds the output of: sensitivity."),
    ],
)
def test_a_run_of_one_stage_about_routers(tmp_path, undrawn, stage, made, expected, summary):
    write(tmp_path / "run" / stage, *made)
    result = build_report(tmp_path / "run", tmp_path / "out", TOPICS)
    page = Page(result["index"].read_text(encoding="utf-8"))
    assert page.sections() == expected and result["family"] == 0
    assert summary in page.text
    assert ["granularity", "2"] in page.rows


def test_equal_input_gives_equal_bytes(tmp_path, monkeypatch):
    made = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        run, out = Path("run"), Path("out")
        write(run / "importance", ablation())
        values = evaluation(trained=True)
        write(run / "evaluate", {**values, "networks": values["networks"][:8]})
        write(run / "router", *synthetic.routing())
        write(run / "sensitivity", synthetic.sensitivity())
        write(run / "compare", synthetic.compare())
        build_report(run, out, TOPICS)
        made.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert len(made[0]) == 11 and made[0] == made[1]


def test_bad_input_writes_nothing(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "evaluate" / "metrics.json").write_text('{"stage": "evaluate", "networks": [', encoding="utf-8")
    (tmp_path / "out").mkdir()
    with pytest.raises(FlextronError) as caught:
        build_report(run, tmp_path / "out", TOPICS)
    assert str(run / "evaluate" / "metrics.json") in str(caught.value) and "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_settings_come_from_the_latest_stage_that_knows_them(tmp_path, undrawn):
    def chosen() -> list:
        build_report(tmp_path / "run", tmp_path / "out", TOPICS)
        values = json.loads((tmp_path / "out" / "family.json").read_text(encoding="utf-8"))
        return [values["model"], values["space"]]

    write(tmp_path / "run" / "import", {"stage": "import", "model": {"from": "import"}})
    assert chosen() == [{"from": "import"}, None]
    write(tmp_path / "run" / "pretrain", {**ELASTIC, "stage": "pretrain", "model": {"from": "it"}, "space": {"from": "it"}})
    write(tmp_path / "run" / "elastic", {**ELASTIC, "model": {"from": "elastic"}})
    assert chosen() == [{"from": "elastic"}, {"from": "it"}]
    write(tmp_path / "run" / "evaluate", EVALUATE)
    assert chosen() == [MODEL.to_dict(), {"from": "it"}]


def test_a_topic_is_added_without_an_edit(tmp_path):
    read = lambda output: output.metrics.read("loss", float)  # noqa: E731
    section = lambda results: [Section("mine", "My topic", f"lowest {min(results)}", [], [])]  # noqa: E731
    mine = Topic(("evaluate",), read, section, lambda results: Highlights(["A sentence of mine."], values={"mine": results}))
    for name, loss in (("one", 2.5), ("two", 2.0)):
        write(tmp_path / "run" / name, {"stage": "evaluate", "loss": loss})
    page = Page(build_report(tmp_path / "run", tmp_path / "out", (mine,))["index"].read_text(encoding="utf-8"))
    assert page.sections() == ["mine"] and "lowest 2.0" in page.text and "A sentence of mine." in page.text
    assert json.loads((tmp_path / "out" / "family.json").read_text(encoding="utf-8"))["mine"] == [2.5, 2.0]
