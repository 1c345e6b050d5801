"""README.md and the site's report are those that scripts/quickstart_docs.py makes of one quickstart's results."""

import base64
import importlib.util
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("quickstart_docs", ROOT / "scripts/quickstart_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made(script, tmp_path) -> dict[str, str]:
    """Tables of a run whose metrics hold what the script reads."""
    networks = [{"name": name, "parameters": 1234567 + i, "mean": {"loss": 2.5 + i / 8}} for i, name in enumerate(script.FAMILY)]
    targets = (0.57, 0.66, 0.76, 0.86, 0.95)
    rows = [
        {"selector": name, "target": t, "mean_loss": 3.0625 - t / 8 + i / 8}
        for i, name in enumerate(("router", "uniform"))
        for t in targets
    ]
    metrics = {
        "evaluate_before": {"networks": networks},
        "evaluate": {"networks": networks},
        "sorted": {
            "ablation": [
                {"setup": setup, "order": order, "loss": 3.0 + i / 8 + (order == "unsorted")}
                for i, setup in enumerate(("full (baseline)", "4 of 8 heads", "256 of 512 FFN neurons"))
                for order in ("unsorted", "sorted")
            ]
        },
        "compare": {"networks": rows, "random": [{"target": t, "mean_losses": [3.5, 3.25, 3.75]} for t in targets]},
    }
    for stage, values in metrics.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.json").write_text(json.dumps(values))
    return script.tables(tmp_path)


def layout(text: str) -> list[list[str]]:
    """Cells of each table in a page's marked parts, with every digit as 0; numbers of columns must agree."""
    tables = re.findall(r"<!-- quickstart: \w+ -->\n(.*?)<!-- end -->", text, re.S)
    return [re.sub(r"\d", "0", table).splitlines() for table in tables]


def test_readme_has_the_layout_of_the_script(script, made):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    filled = script.filled(readme, made)
    found, expected = layout(readme), layout(filled)
    assert len(found) == len(made) == 3
    for table, wanted in zip(found, expected, strict=True):
        assert [re.sub(r"[0,.]+", "0", row) for row in table] == [re.sub(r"[0,.]+", "0", row) for row in wanted]
    assert script.filled(filled, made) == filled


def test_figures_are_those_of_the_run(made):
    assert "| full model | 1,234,567 | 2.500 | 2.500 |" in made["family"]
    assert "| 0.57 | 2.991 | 3.116 | 3.500 |" in made["budgets"]
    assert "neurons the loss is 4.250 unsorted and 3.250 sorted" in made["sorting"]
    assert "heads the loss is 4.125 unsorted and 3.125 sorted" in made["sorting"]


def test_a_selector_without_a_network_leaves_its_cell_empty(script, tmp_path, made):
    file = tmp_path / "compare/metrics.json"
    values = json.loads(file.read_text())
    values["networks"] = [row for row in values["networks"] if (row["selector"], row["target"]) != ("uniform", 0.57)]
    file.write_text(json.dumps(values))
    assert "| 0.57 | 2.991 |  | 3.500 |" in script.tables(tmp_path)["budgets"]


def test_readme_and_the_report_of_the_site_are_of_one_run(script):
    report = script.REPORT.read_text(encoding="utf-8")
    parts = re.findall(r"<!-- quickstart: \w+ -->\n(.*?)<!-- end -->", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    losses = {figure for part in parts for figure in re.findall(r"\d\.\d{3}", part)}
    assert len(losses) > 25 and not [loss for loss in losses if loss not in report]


def test_the_report_of_the_site_is_small_and_names_no_machine(script):
    report = script.REPORT.read_text(encoding="utf-8")
    assert len(report) < 1_000_000 and "checkpoint=runs/quickstart/" in report
    assert not re.search(r"[\"'=](?:/tmp|/root|/home|/work)/", report)


def test_pictures_get_smaller_and_paths_general(script, tmp_path):
    file = io.BytesIO()
    Image.effect_noise((40, 20), 90).save(file, "PNG")
    page = f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"> checkpoint={tmp_path}/joint'
    small = script.small(page, tmp_path)
    assert small.endswith(" checkpoint=runs/quickstart/joint") and len(small) < len(page)
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r'image/webp;base64,(.*?)"', small)[1])))
    assert picture.size == (20, 10)
