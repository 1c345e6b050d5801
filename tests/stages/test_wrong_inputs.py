"""Wrong inputs of every stage: exit code 2, one line without a name of Python's errors, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from flextron_mcore.cli import main
from flextron_mcore.runtime import signals
from flextron_mcore.settings.stages import STAGES
from tests import hf_toy

PYTHON = re.compile(r"\b[A-Z]\w*(Error|Exception|Warning|Exit)\b|Traceback|Errno|\bNone\b|\bdict\b|<class|object at 0x|\w\(\)")
MODEL = ["num_layers=1", "hidden_size=32", "num_attention_heads=4", "ffn_hidden_size=64", "max_position_embeddings=32"]
STEP = ["trainer.max_steps=1", "model.micro_batch_size=2", "model.global_batch_size=2"]
DATA = "data={run}/data"

# {stage: keys with which it would run}; a case adds wrong ones. {run}: the chain of stages; {in}: directory of odd files.
GOOD = {
    "prepare": ["input={in}/text", "vocab_size=300"],
    "pretrain": [DATA, *(f"model.{key}" for key in MODEL), *STEP],
    "import": ["hf={in}/hf"],
    "importance": ["checkpoint={run}/parent", DATA, "samples=8", "ablation_batches=0"],
    "elastic": ["checkpoint={run}/sorted", DATA, *STEP],
    "latency": ["checkpoint={run}/sorted", "rounds=1"],
    "router": ["checkpoint={run}/elastic", DATA, *STEP],
    "joint": ["checkpoint={run}/elastic", DATA, *STEP],
    "gumbel": ["checkpoint={run}/sorted", DATA, *STEP],
    "sensitivity": ["checkpoint={run}/elastic", DATA, "limit_val_batches=1"],
    "family": ["checkpoint={run}/elastic", "selector=uniform", "budgets=[0.7 parameters]"],
    "select": ["checkpoint={run}/elastic", "selector=uniform", "budget=0.7 parameters"],
    "compare": ["checkpoint={run}/elastic", DATA, "selectors=[uniform]", "limit_val_batches=1", "random_at_target=0"],
    "evaluate": ["checkpoint={run}/elastic", DATA, "limit_val_batches=1"],
    "generate": ["checkpoint={run}/elastic", "prompt=x", "max_new_tokens=2"],
    "export": ["checkpoint={run}/elastic"],
    "report": ["run={run}"],
    "verify": [],
    "quickstart": [],
    "launch": ["cluster.account=a", "dry_run=true"],
    "status": [],
}

LONG = "y" * 300
# {stage: (wrong keys, words of the refusal)}
WRONG = {
    "prepare": [
        ("=x", "unknown key ''"),
        ("out.=x", "unknown key 'out.'"),
        ("séed=3", "unknown key 'séed' (did you mean 'seed'?)"),
        ("--seed=3", "unknown key '--seed' (did you mean 'seed'?)"),
        ("seed", "'seed' is not of the form key=value"),
        ("seed=", "seed= must be a whole number"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("seed=1.5", "seed=1.5 must be a whole number"),
        ("seed=nan", "seed=nan must be a whole number"),
        ("seed=[1]", "seed=[1] must be a whole number"),
        ("seed=１２３x", "must be a whole number"),
        ("seed=99999999999999999999999999", "must be at most 4294967295"),
        ("overwrite=2", "overwrite=2 must be true or false"),
        ("add_bos=yes please", "add_bos=yes please must be true or false or null"),
        ("out=", "out= is empty: give a path"),
        (f"out={LONG}", "is too long: a name may have 255 bytes"),
        ("out=a\0b", "has a NUL character, which no path can have"),
        ("out=a\udcffb", "is not UTF-8: type it in UTF-8"),
        ("out=/proc/x", "cannot be written: No such file or directory"),
        ("out=/dev/null", "is a file, not a directory"),
        ("out={in}/note.txt", "is a file, not a directory"),
        ("input=", "input= is empty: give a path"),
        ("input={a: null}", "input.a: must be a path or a list of paths, not null"),
        ("input={a: {b: c}}", "input.a: must be a path or a list of paths"),
        ("input={..: {in}/text}", "the domain's name '..' must begin with a letter or digit"),
        (f"input={LONG}", "is too long"),
        ("input={in}/empty", "has no document"),
        ("input={in}/junk", "is not UTF-8 text: byte 0xff"),
        ("valid_fraction=5%", "valid_fraction=5% must be a number above 0"),
        ("vocab_size=4k", "vocab_size=4k must be a whole number"),
        ("tokenizer=gpt2", "tokenizer=gpt2: no such directory"),
        ("tokenizer=~no-such-user/t", "tokenizer=~no-such-user/t: no such directory"),
        ("tokenizer={in}/hf-vocabulary", "hf-vocabulary: not a tokenizer that transformers can open: lacks 'added_tokens'"),
        ("tokenizer={in}/tokens-list", "tokens-list: not a tokenizer that transformers can open: an entry is missing or of"),
        ("input=~no-such-user/t", "~no-such-user/t: no such file or directory"),
        ("split=9,9,9", "split=9,9,9 has an effect with paths= only: leave split out"),
        ("input=null paths=[{in}/x] vocab_size=300 skip_bad=true", "skip_bad=true has an effect with input= only"),
        ("--config=/nowhere", "--config /nowhere: holds all keys"),
        ("--config", "--config: lacks its value: write --config=PATH"),
        ("--config-dir", "--config-dir: lacks its value"),
        ("--config-dir={in}/note.txt", "no such directory"),
    ],
    "pretrain": [
        ("data={in}/note.txt", "set data= to a directory that `flextron prepare` wrote"),
        ("data_weights={nope: 1}", "no domain 'nope'"),
        ("data_weights.=1", "unknown key 'data_weights.'"),
        ("model=../x", "model=../x is not known"),
        ("model.num_layers=1e9", "model.num_layers=1e9 must be a whole number"),
        ("model.num_query_groups=3", "is not divisible by model.num_query_groups=3"),
        ("model.hidden_size=1000000", "of memory on a rank"),
        ("model.rope_scaling={a: 1}", "use one of linear, llama3, yarn, longrope"),
        ("model.recompute_method=uniform", "has an effect with model.recompute_granularity=full only"),
        ("model.recompute_num_layers=5", "has an effect with model.recompute_granularity=full only"),
        ("model.recompute_modules=[mlp]", "has an effect with model.recompute_granularity=selective only"),
        ("model.recompute_granularity=full", "needs model.recompute_method=uniform or block"),
        ("model.optim.lr=0", "model.optim.min_lr=0.0001 is above model.optim.lr=0"),
        ("model.optim.betas=[0.9,0.99,0.999]", "must be a list of 2 numbers"),
        ("model.optim=sgd", "unknown key 'model.optim'"),
        ("trainer.num_nodes=3", "trainer.num_nodes=3 does not divide the 1 process(es)"),
        ("trainer.max_steps=99999999999999999999", "must be at most 100000000"),
        ("trainer.max_time=99", "write it as days:hours:minutes:seconds"),
        ("space.heads=[]", "space.heads must be a list"),
        ("space.heads=[1.5]", "is not within 1..4"),
    ],
    "import": [
        ("hf=meta-llama/Llama-3.2-1B", "no such directory: name the directory of a Hugging Face model on this machine"),
        ("hf={in}/note.txt", "no such directory"),
        ("hf=~no-such-user/x", "hf=~no-such-user/x: no such directory"),
        ("hf={in}/list", "not a JSON object"),
        ("hf={in}/bad", "not readable as JSON"),
        ("hf={run}/data", "config.json: no such file"),
        ("out={in}/hf", "is the input hf="),
        ("dtype=int8", "dtype='int8' is not known: use one of fp32, bf16"),
        ("resize_vocabulary=true", "has no tokenizer.json or vocab.json"),
        ("hf={in}/hf-ids", 'hf-ids/config.json: eos_token_id is [5, "x"], not a token\'s id: correct it'),
        ("hf={in}/hf-null", "hf-null/config.json: architecture null is not supported: only"),
        ("hf={in}/hf-vocabulary", "hf-vocabulary/tokenizer.json: is not a tokenizer's vocabulary"),
        ("hf={in}/hf-map", "hf-map/special_tokens_map.json: is damaged: Expecting"),
        ("hf={in}/hf-class", "hf-class/tokenizer_config.json: is damaged: Expecting"),
    ],
    "importance": [
        ("checkpoint={in}/hf", "no checkpoint in it"),
        ("samples=99999999999999", "must be at most 100000000"),
        ("model.seq_length=33", "model.seq_length=33 is not within 1..32"),
        ("model.micro_batch_size=99999999", "lower model.micro_batch_size or model.seq_length"),
        ("space.granularity=7", "is not a multiple of 7"),
        ("score=activation", "score=activation is not known: use one of paper; set score.heads, score.kv_groups and"),
        ("layer_score=mse", "layer_score= is no key any more: set score.depth"),
        ("score.heads=mse", "score.heads='mse' is not known: use one of energy, activation, activation_weight"),
    ],
    "elastic": [
        ("mode=both", "use one of flextron, matformer"),
        ("distilation.weight=0.5", "did you mean 'distillation.weight'?"),
        ("num_subnetworks=99999999999", "must be at most 10000"),
        ("space.heads=[2]", "is of another space"),
        ("model.optim.min_lr=1", "is above model.optim.lr=0.0005"),
    ],
    "latency": [
        ("measurements=/nowhere", "No such file or directory"),
        ("measurements={in}/note.txt", "Expecting value"),
        ("measurements={in}/number.json", "not a list with at least one entry"),
        ("measurements={in}/object.json", "not a list with at least one entry"),
        ("measurements={in}/list.json", "an entry is missing or of another type"),
        ("measurements={run}", "is a directory, not a regular file"),
        ("setting.generated_tokens=3", "setting.generated_tokens=3 has an effect with setting.kind=generation only"),
        ("routed.rounds=3", "routed.rounds=3 has an effect with routed.enabled=true only"),
        ("setting.prompt_length=33", "do not fit the model's 32 positions"),
        ("setting.batch_size=1000000000", "lower setting.batch_size or setting.prompt_length"),
        ("check_networks=99999999999", "must be at most 1000000"),
    ],
    "router": [
        ("costs=[]", "costs=[] must have at least one item"),
        ("costs=[parameters,parameters]", "costs=[parameters,parameters]: has one twice"),
        ("costs=[latency]", "give latency=, a table of `flextron latency`"),
        ("targets.high=0.1", "are no range within"),
        ("validation_targets=[]", "validation_targets=[] must have at least one item"),
        ("latency=", "latency= is empty"),
        ("latency={run}/elastic", "latency.json: is not a latency table (No such file or directory)"),
        ("latency={in}/object.json", "is not a latency table (lacks 'format')"),
        ("router.batch_size=99999999999", "must be at most 1000000"),
        ("router.hidden_size=99999999", "must be at most 65536"),
        ("surrogate=false", "unknown key 'surrogate'"),
        ("kv_policy=own", "kv_policy=own has an effect with kind=adaptive only: set that too, or leave kv_policy out"),
        ("kv_cache={batch: 2}", "unknown key 'kv_cache.batch' (did you mean 'kv_cache.batch_size'?)"),
    ],
    "joint": [
        ("router.entropy=x", "must be a list of 2 numbers"),
        ("targets_per_step=0", "at least 1"),
        ("seed=0", "has no routers"),
    ],
    "gumbel": [
        ("modulation=3", "modulation=3 must be true or false or null"),
        ("router.weighted_per_step=9", "is not within 1 and targets_per_step=3"),
        ("router.temperature=[0,1]", "each above 0"),
    ],
    "sensitivity": [("limit_val_batches=all", "must be a whole number"), ("space.depth=[1]", "of another space")],
    "family": [
        ("budgets=[null]", "budgets=[null]: must be a list such as"),
        ("budgets=[]", "budgets=[]: must be a list such as"),
        ("budgets=[2e9 units]", "the unit 'units' is not known"),
        ("budgets=[0.7 parameters,0.7 parameters]", "has one twice"),
        ("formats=[hf,hf]", "formats=[hf,hf] has one twice"),
        ("data=/nowhere", "set data= to a directory that `flextron prepare` wrote"),
        ("compensate=true", "compensate=true: needs text to calibrate on: give data="),
        ("samples=3", "samples=3 has an effect with compensate=true only"),
    ],
    "select": [
        ("budget=0 parameters", "is not within"),
        ("budget=-1 parameters", "is not within"),
        ("budget=3.4b", "the unit 'b' is not known"),
        ("budget=0,8 parameters", "has a comma within a number: write 0.8 parameters"),
        ("budget=1,5GiB", "has a comma within a number: write 1.5GiB"),
        ("budget=0.9 parameters,0.8 parameters", "limits parameters twice: give one limit of each cost"),
        ("budget=½ parameters", "is not a number with a unit"),
        ("budget=[]", "is empty; give one such as 0.6"),
        ("selector=oracle", "is not known: use one of router"),
        ("selector=sensitivity", "give sensitivity="),
        ("selector=sensitivity sensitivity={in}/list.json", "is not what `flextron sensitivity` writes"),
        ("selector=sensitivity sensitivity=/nowhere", "(No such file or directory)"),
        ("data={run}/data", "has an effect with selector=random only"),
        ("measure=false rounds=3", "rounds=3 has an effect with measure=true only"),
        ("selector=random data={run}/data model.seq_length=99", "is not within 1..32"),
        ("out={in}", "is a directory; name a file"),
        ("out=", "out= is empty"),
    ],
    "compare": [
        ("selectors=[]", "selectors=[] must have at least one item"),
        ("selectors=[uniform,uniform]", "has one twice: name each once"),
        ("targets=[]", "targets=[] must have at least one item"),
        ("random_networks=3", "random_networks=3 has an effect with selectors=random only"),
        ("targets=[0.01]", "is not within"),
        ("cost=latency", "needs a latency table"),
        ("dense=[{run}/data]", "no checkpoint in it"),
    ],
    "evaluate": [
        ("subnetwork=[]", "subnetwork=[] must have at least one item"),
        ("subnetwork={in}/list.json", "expected an object"),
        ("subnetwork={in}/note.txt", "not readable as JSON"),
        ("budget=0.7 parameters", "has no routers"),
        ("random=99999999999", "must be at most 1000000"),
        ("kv_policy=full", "kv_policy=full has an effect with selector=adaptive only"),
    ],
    "generate": [
        ("kv_policy=own", "kv_policy=own has an effect with selector=adaptive only"),
        ("prompt=[]", "there is no prompt"),
        ("prompts={in}/note.txt", "give one of prompt="),
        ("prompt=null prompts={in}/junk", "cannot be read as text: not UTF-8 text: byte 0xff at offset 1"),
        ("max_new_tokens=1000", "lower max_new_tokens, or shorten the prompt"),
        ("temperature=inf", "temperature=inf must be finite"),
        ("tokenizer={in}/hf", "not a tokenizer that transformers can open"),
    ],
    "export": [
        ("format=onnx", "use one of hf"),
        ("max_shard_size=1GB", "must be a whole number"),
        ("gguf.type=f16", "gguf.type=f16 has an effect with format=gguf only"),
        ("trtllm={style: deci}", "trtllm.style=deci has an effect with format=trtllm only"),
        ("gguf={typ: f16}", "did you mean 'gguf.type'?"),
        ("budget=0.7 parameters subnetwork={in}/list.json", "two ways to say which network"),
        ("format=trtllm trtllm.tensor_parallel_size=3", "which it does not divide"),
        ("format=hf_elastic hf_elastic.latency=/nowhere", "is not a latency table (No such file or directory)"),
        ("compensate=true", "compensate=true: needs text to calibrate on: give data="),
        ("compensate=true data=/nowhere", "set data= to a directory that `flextron prepare` wrote"),
        ("compensate=true data={run}/data format=hf_elastic", "all sub-networks share its weights"),
        ("compensate=true data={run}/data model.seq_length=99 budget=0.7 parameters selector=uniform", "is not within 1..32"),
        ("data={run}/data", "data={run}/data has an effect with compensate=true only"),
        ("samples=3", "samples=3 has an effect with compensate=true only"),
        ("limit_val_batches=3", "limit_val_batches=3 has an effect with compensate=true only"),
    ],
    "report": [("run={in}/note.txt", "no such directory"), ("run=", "run= is empty"), ("theme=dark", "unknown key 'theme'")],
    "verify": [
        ("", "missing path="),
        ("/a /b", "checks one path at a time: call it again for /b"),
        ("path=/dev/null", "is neither a file nor a directory"),
        ("{in}/note.txt", "nothing in it has a digest"),
    ],
    "quickstart": [
        ("out={in}", "exists and was not written by `flextron quickstart`; choose another"),
        ("out={in}/old", "holds a `flextron quickstart` of other keys; choose another, or overwrite=true"),
        ("out={in}/torn", "config.yaml: is damaged ("),
        ("input=/nowhere", "/nowhere: no such file or directory"),
        ("recipe=short", "quickstart: recipe=short cannot be used here: unknown key 'run'; `flextron quickstart --help` lists"),
        ("model=x", "model=x is not known"),
        ("pretrain_steps=1.5", "must be a whole number"),
        ("chain={a: b}", "every command needs a stage and a list of keys"),
    ],
    "launch": [
        ("stages=[importt]", "did you mean 'import'?"),
        ("gpus=-8", "gpus=-8 must be at least 1"),
        ("budgets=[2e9 units]", "the unit 'units' is not known"),
        ("budgets=[0.5,0]", "budget=0: export can choose no network for it: give a share"),
        ("budgets=[1.5]", "budget=1.5: export can choose no network for it"),
        ("run.name=..", "run.name=..: write it as"),
        ("run.time_limit=forever", "is not a time"),
        ("cluster.account=", "is empty"),
        ("env_vars={A B: 1}", "is not the name of a variable"),
        ("container=", "container= is empty"),
    ],
    "status": [
        ("", "missing run="),
        ("run={in}/note.txt", "cannot be read (Not a directory)"),
        ("run=x watch=soon", "true or false"),
    ],
}
CASES = [(stage, typed, words) for stage, cases in WRONG.items() for typed, words in cases]


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    yield
    for number, handler in zip(signals.SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """Directory of files that no stage expects, with a text and a model that it does."""
    root = tmp_path_factory.mktemp("in")
    hf_toy.save(hf_toy.llama(), root / "hf")
    for name, file, content in (
        ("hf-ids", "config.json", {"eos_token_id": [5, "x"]}),
        ("hf-null", "config.json", {"architectures": [None]}),
        ("hf-vocabulary", "tokenizer.json", {"model": {"vocab": {"a": None}, "type": "BPE"}}),
    ):
        shutil.copytree(root / "hf", root / name)
        values = json.loads((root / name / file).read_text()) if (root / name / file).is_file() else {}
        (root / name / file).write_text(json.dumps({**values, **content}))
    for name, file in (("hf-map", "special_tokens_map.json"), ("hf-class", "tokenizer_config.json")):
        shutil.copytree(root / "hf", root / name)
        (root / name / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
        (root / name / file).write_text("{")
    (root / "tokens-list").mkdir()
    (root / "tokens-list" / "tokenizer.json").write_text("[]")
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text("a text of some words\n" * 20)
    for name, content in (("list", "[]"), ("bad", "{nope")):
        (root / name).mkdir()
        (root / name / "config.json").write_text(content)
    for name, content in (("old", "stage: quickstart\nchain: {}\n"), ("torn", "chain: {")):
        (root / name).mkdir()
        (root / name / "config.yaml").write_text(content)
    for name, content in (
        ("number.json", "3"),
        ("object.json", "{}"),
        ("list.json", "[1, 2]"),
        ("note.txt", "a note"),
        ("empty", ""),
    ):
        (root / name).write_text(content)
    (root / "junk").write_bytes(b"\0\xff\xfejunk")
    return root


def files(*folders: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


def place(keys: list[str], run: Path, odd: Path) -> list[str]:
    return [key.replace("{run}", str(run)).replace("{in}", str(odd)) for key in keys]


def test_every_stage_gets_wrong_inputs():
    assert WRONG.keys() == GOOD.keys() == STAGES.keys() and len(CASES) >= 60


@pytest.mark.parametrize(("stage", "typed", "words"), CASES, ids=[f"{stage} {typed[:60]}" for stage, typed, _ in CASES])
def test_a_wrong_input_is_one_line(stage, typed, words, chain, odd, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = [] if stage in ("launch", "status", "verify") else ["out=out"]
    # A case may hold several keys, separated by spaces; values may hold spaces, too.
    wrong = re.split(r" (?=[\w.]+=|/)", typed) if typed else []
    before = files(chain, odd, tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([stage, *place([*GOOD[stage], *out, *wrong], chain, odd)])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.err.startswith("flextron: error: ") and len(printed.err.splitlines()) == 1
    assert place([words], chain, odd)[0] in printed.err and not PYTHON.search(printed.err)
    assert files(chain, odd, tmp_path) == before


@pytest.mark.parametrize("arguments", [[""], ["--halp"], ["PREPARE"], ["import_"], ["elástic"], ["prepare", "--config=/nowhere"]])
def test_a_wrong_command_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and len(printed.err.splitlines()) == 1 and not PYTHON.search(printed.err)
