"""Configurations made by others: no resolver reads the environment, no tag makes an object, no name becomes code."""

from __future__ import annotations

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.runs.resume import _read_config
from flextron_mcore.settings.compose import compose, read, to_yaml

INTERPOLATIONS = ["${oc.env:FLEXTRON_SECRET}", "${oc.decode:1}", "${oc.create:{a: 1}}", "${hydra:runtime.cwd}", "${model.seed}"]


@pytest.mark.parametrize("text", INTERPOLATIONS)
def test_a_configuration_is_taken_literally(tmp_path, monkeypatch, text):
    monkeypatch.setenv("FLEXTRON_SECRET", "secret")
    values = compose("pretrain", [f"data='{text}'", f"out={tmp_path}/out"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(values))
    assert text in file.read_text() and read("pretrain", file).data == text
    assert _read_config(file)["data"] == text


@pytest.mark.parametrize("text", INTERPOLATIONS[:-1])
def test_a_recipe_cannot_call(tmp_path, monkeypatch, text):
    """A recipe of --config-dir may refer to keys, but not to the environment of the user who runs it."""
    monkeypatch.setenv("FLEXTRON_SECRET", "secret")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(f"# @package _global_\ndata: '{text}'\n")
    with pytest.raises(FlextronError, match="model=mine space=default: .* is not allowed in a recipe: write the value"):
        compose("pretrain", ["model=mine", f"out={tmp_path}/out"], [tmp_path])


@pytest.mark.parametrize(
    "text, words",
    [
        ("!!python/object/apply:os.system [x]", "model=mine space=default: "),
        ("[", "model=mine space=default: "),
        ("a: &a [*a]", "model=mine space=default: "),
        ("- x", "pretrain: model=mine space=default cannot be used here: unknown key 'model'"),
        ("# @package _global_\nseed: ${nothing}", "pretrain: seed: Interpolation key 'nothing' not found: write a value"),
        ("defaults: [/etc/passwd]", "model=mine space=default: .*etc/passwd"),
    ],
)
def test_a_recipe_that_is_none(tmp_path, text, words):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(text)
    with pytest.raises(FlextronError, match=words):
        compose("pretrain", ["model=mine", "data=x", f"out={tmp_path}/out"], [tmp_path])


def test_a_configuration_cannot_agree_to_run_code(tmp_path):
    keys = ["checkpoint=x", "data=y", "tasks=[mine]", f"tasks_dir={tmp_path}", "tasks_trust_code=true", f"out={tmp_path}/out"]
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(compose("evaluate", keys)))
    with pytest.raises(FlextronError, match="tasks_trust_code=true lets code run: type it"):
        read("evaluate", file)
