"""Values of keys: texts and paths are taken exactly as typed; other types are parsed, or refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flextron_mcore.config import FlextronError
from flextron_mcore.settings.compose import compose, missing, read, to_dict, to_yaml
from flextron_mcore.settings.schema import keys
from flextron_mcore.settings.stages import STAGES

ODD = ["2024", "données", "/d/my,model", "corpus/lang=en/part.jsonl", "Hello, world", "node[01-04]", "two words", "it's", 'a "b"']
ODD += [
    "nvcr.io#nvidia/pytorch",
    "$HOME/x",
    "a~b",
    "{x}",
    "${x}",
    "\\${x}",
    "${oc.env:HOME}",
    "",
    "true",
    "1e3",
    "007",
    "[a",
    "a]",
    "=",
    "???x",
    " x ",
]


def at(values, name: str):
    for part in name.split("."):
        values = values[part] if isinstance(values, dict) else getattr(values, part)
    return values


TEXTS = {
    stage: [key for key in keys(schema).values() if key.literal and not key.limits.choices and not key.limits.form]
    for stage, schema in STAGES.items()
}
# Stages that compose recipes are left out, because they are slow.
CHEAP = [(stage, key) for stage in sorted(STAGES.keys() - {"launch", "pretrain", "quickstart", "import"}) for key in TEXTS[stage]]


@pytest.mark.parametrize("stage", STAGES)
def test_a_text_is_what_was_typed(stage: str):
    for text in ODD:
        known = [key for key in TEXTS[stage] if text or not key.limits.is_path]  # an empty path is refused
        needed = {key.limits.only for key in known} - {""}
        composed = compose(stage, [*needed, *(f"{key.name}={text}" for key in known)], partial=True)
        for key in known:
            assert at(composed, key.name) == text, f"{stage}: {key.name}"


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(CHEAP),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"], include_characters="\n\t")),
)
@example(("elastic", keys(STAGES["elastic"])["out"]), "\\\\${a}${b")
def test_any_text_is_what_was_typed(case, text):
    """Any text survives the command line, the file that a stage writes, and a file that it reads."""
    stage, key = case
    quoted = text[:1] in ("'", '"') and text[-1:] == text[:1]
    if quoted or text == "null" or text == "???" or (key.limits.is_path and (not text or text.startswith("~"))):
        return
    needed = list(filter(None, [key.limits.only]))
    composed = compose(stage, [*needed, f"{key.name}={text}"], partial=True)
    assert at(composed, key.name) == text
    assert at(yaml.safe_load(to_yaml(composed)), key.name) == at(to_dict(composed), key.name) == text
    assert at(compose(stage, needed, values=[at_depth(key.name, text)], partial=True), key.name) == text


def at_depth(name: str, value):
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def test_quotes_around_the_whole_keep_what_else_has_a_meaning():
    for typed, value in (
        ("null", None),
        ('"null"', "null"),
        ("'it\\'s'", "it's"),
        ("'a' and 'b'", "'a' and 'b'"),
        ("\"'a'\"", "'a'"),
    ):
        assert compose("select", [f"latency={typed}"], partial=True).latency == value


def test_paths_have_their_home_expanded():
    home = os.path.expanduser("~")
    for stage in STAGES:
        for name, key in keys(STAGES[stage]).items():
            if key.limits.is_path:
                needed = filter(None, [key.limits.only])
                found = at(compose(stage, [*needed, f"{name}=~/a b"], partial=True), name)
                assert found == ([f"{home}/a b"] if key.type is list else f"{home}/a b"), f"{stage}: {name}"
    found = compose("prepare", ["input={code: [~/a, b], web: ~/c}", "tokenizer=~nobody_there/x"], partial=True)
    assert found.input == {"code": [f"{home}/a", "b"], "web": f"{home}/c"} and found.tokenizer == "~nobody_there/x"
    assert compose("launch", ["container_mounts=[~/x:/x]", "cluster.account=a"]).container_mounts == [f"{home}/x:/x"]


def test_a_section_may_be_given_at_once():
    typed = ["checkpoint=a", "budget=0.5", "kv_cache={batch_size: 2, length: 16}"]
    assert compose("select", typed) == compose("select", [*typed[:2], "kv_cache.batch_size=2", "kv_cache.length=16"])


@pytest.mark.parametrize(
    "stage, typed, value",
    [
        ("prepare", "input=corpus/lang=en/part.jsonl", "corpus/lang=en/part.jsonl"),
        ("prepare", "input=[corpus/lang=en/part.jsonl,b]", ["corpus/lang=en/part.jsonl", "b"]),
        ("prepare", "input={en: corpus/lang=en/part.jsonl, de: [x, y]}", {"en": "corpus/lang=en/part.jsonl", "de": ["x", "y"]}),
        ("prepare", "input=[odd name", "[odd name"),
        ("generate", "prompt=Hello, world", ["Hello, world"]),
        ("generate", "prompt=[Hello, world]", ["Hello", "world"]),
        ("generate", "prompt=['Hello, world', \"it's\"]", ["Hello, world", "it's"]),
        ("generate", "prompt=[]", []),
        ("generate", "prompt=null", None),
        ("generate", "prompt=2024", ["2024"]),
        ("compare", "dense=[007,1.10]", ["007", "1.10"]),
        ("compare", "selectors=router", ["router"]),
        ("router", "costs=[latency, memory]", ["latency", "memory"]),
        ("importance", "space.heads=[0.5,8]", [0.5, 8]),
        ("importance", "data_weights={code: 1, web: 0.5}", {"code": 1.0, "web": 0.5}),
        ("importance", "data_weights.code=2", {"code": 2.0}),
        ("elastic", "model.optim.betas=[0,0.5]", [0.0, 0.5]),
        ("elastic", "model.optim.lr=1e-3", 1e-3),
        ("elastic", "trainer.max_steps=7", 7),
        ("elastic", "model.sequence_parallel=true", True),
        ("select", "budget=0.6", 0.6),
        ("select", "budget=0.6 parameters", "0.6 parameters"),
        ("select", "budget=[25ms,8GiB]", ["25ms", "8GiB"]),
        (
            "family",
            'budgets=["0.6 parameters",["0.8 parameters","0.95 memory"],0.5]',
            ["0.6 parameters", ["0.8 parameters", "0.95 memory"], 0.5],
        ),
        ("launch", "cluster.nodelist=node[01-04]", "node[01-04]"),
        ("launch", "cluster.mem=0", "0"),
        ("launch", "cluster.srun_args=[--mpi=pmix]", ["--mpi=pmix"]),
        ("launch", "env_vars={NCCL_DEBUG: INFO, N: 1}", {"NCCL_DEBUG": "INFO", "N": "1"}),
        ("launch", "env_vars.FLAGS=--a=b, c", {"FLAGS": "--a=b, c"}),
        ("launch", "env_vars.FLAGS=true", {"FLAGS": "true"}),
        ("launch", "cluster.additional_parameters.hold=true", {"hold": True}),
        ("elastic", "exp_manager.wandb_logger_kwargs.offline=false", {"offline": False}),
        ("elastic", "exp_manager.wandb_logger_kwargs.name='true'", {"name": "true"}),
        ("launch", "container=nvcr.io#nvidia/pytorch:25.09-py3", "nvcr.io#nvidia/pytorch:25.09-py3"),
        ("launch", "stages=[import,elastic]", ["import", "elastic"]),
    ],
)
def test_values_of_other_types_are_parsed(stage, typed, value):
    name = typed.partition("=")[0]
    name = next(key for key in keys(STAGES[stage]) if name == key or name.startswith(f"{key}."))
    found = at(compose(stage, [typed], partial=True), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "stage, typed, message",
    [
        ("elastic", "trainer.max_steps=many", "elastic: trainer.max_steps=many must be a whole number of at least 1"),
        ("elastic", "trainer.max_steps=1.5", "elastic: trainer.max_steps=1.5 must be a whole number of at least 1"),
        ("elastic", "trainer.max_steps=0", "elastic: trainer.max_steps=0 must be at least 1"),
        ("elastic", "trainer.max_steps=null", "elastic: trainer.max_steps=null must be a whole number of at least 1"),
        ("elastic", "trainer.max_time=soon", "elastic: trainer.max_time=soon: write it as days:hours:minutes:seconds"),
        ("elastic", "model.optim.lr=nan", "elastic: model.optim.lr=nan must be finite"),
        ("elastic", "model.optim.lr=inf", "elastic: model.optim.lr=inf must be finite"),
        (
            "elastic",
            "model.optim.betas=0.9",
            "elastic: model.optim.betas=[0.9] must be a list of 2 numbers, each at least 0 and below 1",
        ),
        (
            "elastic",
            "model.optim.betas=[0.9,1]",
            "elastic: model.optim.betas=[0.9,1.0] must be a list of 2 numbers, each at least 0 and below 1",
        ),
        ("elastic", "model.sequence_parallel=2x", "elastic: model.sequence_parallel=2x must be true or false"),
        ("elastic", "distillation.weight=1.5", "elastic: distillation.weight=1.5 must be within 0..1"),
        ("elastic", "trainer=3", "elastic: unknown key 'trainer'"),
        ("elastic", "distillation={weigth: 0.5}", "elastic: unknown key 'distillation.weigth'"),
        ("elastic", "distillation={weight", "elastic: distillation={weight must be a mapping"),
        ("elastic", "data_weights={code: x}", "elastic: data_weights={code: x} must be a mapping, each at least 0 or null"),
        ("elastic", "data_weights={code: -1}", "elastic: data_weights={code: -1.0} must be a mapping, each at least 0"),
        ("elastic", "data_weights={code: [}", "data_weights={code: [}: cannot be read as a mapping: write it as {name"),
        ("elastic", "out.x=3", "elastic: unknown key 'out.x'"),
        ("router", "router.entropy=[0.1]", "router: router.entropy=[0.1] must be a list of 2 numbers, each above 0"),
        ("select", "budget={a: 1}", "select: budget={a: 1} must be a number or text or a list"),
        ("importance", "space.heads=[a]", "importance: space.heads=[a] must be a list of numbers"),
        ("launch", "importance.score=activation", "importance: score= is no key any more: set score.heads, score.kv_groups and"),
        ("launch", "elastic.trainer.max_steps=0", "elastic: trainer.max_steps=0 must be at least 1"),
        ("launch", "elastic.trainer.max_steps=x", "elastic: trainer.max_steps=x must be a whole number"),
        ("launch", "elastic.mode=flextrn", "elastic: mode='flextrn' is not known: use one of flextron, matformer"),
        ("launch", "elastic.run.time_limt=1", "elastic: unknown key 'run.time_limt' (did you mean 'run.time_limit'?)"),
        ("launch", "training.model.optim.lrr=1", "launch: unknown key 'training.model.optim.lrr' (did you mean"),
        ("launch", "training.trainer.max_steps=-1", "training.trainer.max_steps=-1 must be at least 1"),
        ("launch", "layouts={8: {trainer: {device: 1}}}", "launch: unknown key 'layouts.8.trainer.device' (did you mean"),
        ("launch", "layouts={8: null}", "launch: layouts.8=null must hold keys of stages, such as {model: {"),
        ("launch", "gpus=many", "launch: gpus=many must be a whole number of at least 1"),
        ("launch", "cluster.gpus=8", "launch: unknown key 'cluster.gpus' (did you mean"),
        ("launch", "evaluate.limit_val_batches=0", "evaluate: limit_val_batches=0 must be at least 1"),
    ],
)
def test_bad_values_and_keys_are_refused_in_one_line(stage, typed, message):
    with pytest.raises(FlextronError) as error:
        compose(stage, [typed], partial=True)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_written_configuration_is_read_back(tmp_path: Path):
    for stage in sorted(STAGES.keys() - {"launch"}):  # `launch` writes files for the stages that it plans, none for itself
        needed = missing(compose(stage, partial=True))
        before = compose(stage, [f"{name}=[0.5]" if name == "budgets" else f"{name}=x ${{y}} 1e3" for name in needed])
        file = tmp_path / f"{stage}.yaml"
        file.write_text(to_yaml(before))
        assert list(yaml.safe_load(file.read_text()))[-1] == "seed"  # the last key: a truncated file lacks it
        assert to_dict(read(stage, file)) == to_dict(before)


def test_null_is_none_only_where_a_key_may_have_no_value():
    base = ["checkpoint=null", "data=d", "out=o"]
    settings = compose("elastic", [*base, "model.seq_length=null"])
    assert settings.checkpoint == "null" and settings.model.seq_length is None
    with pytest.raises(FlextronError, match=r"elastic: trainer.max_steps=null must be a whole number of at least 1"):
        compose("elastic", [*base, "trainer.max_steps=null"])


def test_a_recipe_of_the_users_wins_over_a_shipped_one(tmp_path):
    """A recipe is taken from the first of several directories that has it, and from conf/ if none has."""
    for name, layers in (("first", 5), ("second", 6)):
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        sizes = "hidden_size: 8\nnum_attention_heads: 2\nmax_position_embeddings: 8\n"
        (folder / "tiny.yaml").write_text(f"num_layers: {layers}\n{sizes}")
    (tmp_path / "empty").mkdir()
    folders = [tmp_path / name for name in ("empty", "first", "second")]
    mine = compose("pretrain", ["model=tiny"], folders, partial=True)
    shipped = compose("pretrain", ["model=tiny"], folders[:1], partial=True)
    assert (mine.model.num_layers, mine.model.ffn_hidden_size) == (5, None) and shipped.model.num_layers == 4
    assert mine.space == shipped.space
