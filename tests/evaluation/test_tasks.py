"""Tasks of lm_eval are loaded without a download and without code of a foreign directory."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.evaluation.tasks import load_tasks
from tests.tasks_toy import write_tasks

HARMLESS = "task: mine\ndataset_path: json\noutput_type: loglikelihood\n"
# Task files that run code when lm_eval loads them, and words of the refusal.
CODE = {
    "doc_to_text: !function evil.touch": "has the tag !function",
    "x: &a [!function evil.touch]\ny: *a": "has the tag !function",
    "class: evil.Task": "has the key class",
    "process_docs: evil.touch": "has the key process_docs",
    "dataset_path: pandas": "has dataset_path: pandas",
    "dataset_path: ./evil.py": "has dataset_path: ./evil.py",
    "dataset_kwargs: {data_files: 'https://example.org/a.json'}": "has an address in dataset_kwargs",
    "metric_list: [{metric: ./evil.py}]": "has a metric that lm_eval does not define",
    "metric_list: [{metric: acc, hf_evaluate: true}]": "has a metric that lm_eval does not define",
    "include: other/evil.yml": "evil.yml: has the tag !function",
    "group: all\ntask: [{task: a, use_prompt: 'promptsource:*'}]": "has the key use_prompt",
}


@pytest.fixture
def foreign(tmp_path) -> Path:
    """Directory with code that leaves a file behind when it is run, and a task file that includes one."""
    (tmp_path / "other").mkdir()
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef touch(doc): return ''\n")
    (tmp_path / "other" / "evil.yml").write_text("doc_to_text: !function ../evil.touch\n")
    return tmp_path


@pytest.mark.parametrize("code", CODE)
def test_code_of_a_foreign_directory_is_refused(foreign, code):
    keys = {line.split(":")[0] for line in code.splitlines()}
    kept = [line for line in HARMLESS.splitlines() if line.split(":")[0] not in keys]
    (foreign / "mine.yaml").write_text("\n".join([*kept, code, ""]))
    with pytest.raises(FlextronError, match="tasks_dir: ") as error:
        load_tasks(["mine"], folder=str(foreign))
    assert CODE[code] in str(error.value) and "tasks_trust_code=true" in str(error.value)
    assert not (foreign / "ran").exists()


def test_a_template_of_a_foreign_directory_reaches_no_python(foreign):
    write_tasks(foreign)
    file = foreign / "write.yaml"
    file.write_text(file.read_text().replace("{{text}}", "{{text.__class__.__mro__[1].__subclasses__()}}"))
    with pytest.raises(FlextronError, match="tasks: write: lm_eval cannot load it: SecurityError: .*unsafe"):
        load_tasks(["write"], folder=str(foreign))


def test_trusted_code_runs(foreign):
    write_tasks(foreign)
    file = foreign / "write.yaml"
    file.write_text(file.read_text().replace('doc_to_text: "{{text}}"', "doc_to_text: !function evil.touch"))
    load_tasks(["write"], folder=str(foreign), trust_code=True)
    assert (foreign / "ran").exists()


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["heldout_lastword"], {}, r"heldout_lastword is not known \(did you mean 'heldout_last_word'\?\)"),
        (["arc_easy"], {}, r"does not have its data \(allenai/ai2_arc\).*load_dataset\('allenai/ai2_arc', 'ARC-Easy'\)"),
        (["write"], {"num_fewshot": 2, "add": "num_fewshot: 0"}, "num_fewshot=2: write is defined without examples"),
        (["write"], {"add": "generation_kwargs: {do_sample: true}"}, "write samples or searches beams"),
        (["write"], {"add": "dataset_kwargs: {data_files: {test: gone.jsonl}}"}, "write: this machine does not have its data"),
        (["write"], {"add": "output_type: other"}, "write: lm_eval cannot load it: ValueError: Got invalid output_type 'other'"),
        (["write"], {"add": "doc_to_text: ["}, "write.yaml: is not a task file"),
        (["write"], {"folder": "/gone"}, "tasks_dir=/gone: no such directory"),
    ],
)
def test_refused_tasks(tmp_path, names, options, message):
    add, folder = options.pop("add", ""), options.pop("folder", str(tmp_path) if names == ["write"] else None)
    file = write_tasks(tmp_path) / "write.yaml"
    kept = [line for line in file.read_text().splitlines() if line.split(":")[0] != add.split(":")[0]]
    file.write_text("\n".join([*kept, add, ""]))
    with pytest.raises(FlextronError, match=message):
        load_tasks(names, folder=folder, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unsafe_code": True}, "mine runs code that the model writes: set tasks_trust_code=true"),
        ({"doc_to_image": "context"}, "mine asks about pictures or sound"),
    ],
)
def test_tasks_that_are_not_only_text(changes, message):
    rows = [{"context": "a", "target": " b"}]
    config = {"task": "mine", "test_split": "test", "output_type": "loglikelihood", "doc_to_text": "context"}
    task = SimpleNamespace(name="mine", rows=rows, config={**config, "doc_to_target": "target", **changes})
    with pytest.raises(FlextronError, match=message):
        load_tasks(["mine"], [task])


def test_a_task_of_two_groups(tmp_path):
    write_tasks(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(f"group: {name}\ntask: [write]\n")
    with pytest.raises(FlextronError, match="lm_eval refuses them together: .*Duplicate task 'write'.*evaluate them apart"):
        load_tasks(["one", "two"], folder=str(tmp_path))
    assert set(load_tasks(["one"], folder=str(tmp_path)).tasks) == {"write"}


def test_lm_eval_is_installed_for_the_tests():
    assert importlib.util.find_spec("lm_eval") and importlib.util.find_spec("accelerate")
