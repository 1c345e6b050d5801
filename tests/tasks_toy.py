"""Two small tasks of lm_eval as files: texts to write and whole texts to score, some longer than a tiny model's positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
doc_to_text: "{text}"
doc_to_target: "{target}"
"""
WRITE = """
output_type: generate_until
generation_kwargs: {max_gen_toks: 9, until: ["e", "q"], do_sample: false}
metric_list: [{metric: chrf, aggregation: chrf, higher_is_better: true}]
"""
ROLL = "output_type: loglikelihood_rolling\nmetric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]\n"


def write_tasks(folder: Path) -> Path:
    """Write the tasks `write` and `roll` into an existing directory."""
    words = "The loss of a network is the mean over all tokens of the batch. ".split()
    rows = [{"text": " ".join(words[i : i + 3 + 2 * i] * (1 + i % 3)), "end": " ".join(words[-i:])} for i in range(1, 9)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "write.yaml").write_text(TASK.format(name="write", folder=folder, text="{{text}}", target="{{end}}") + WRITE)
    (folder / "roll.yaml").write_text(TASK.format(name="roll", folder=folder, text="", target="{{text}}") + ROLL)
    return folder


def measured(row: dict[str, Any]) -> dict[str, float]:
    """{"task metric name": value}, standard errors included, of a row of metrics.json. Values that are None are left out."""
    found = {}
    for task, metrics in row["tasks"].items():
        for metric, values in metrics.items():
            found |= {f"{task} {metric} {key}": value for key, value in values.items() if value is not None}
    return found
