"""Opening a Hugging Face directory: dtypes, unknown tensors, damaged or missing files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flextron_mcore.checkpoint.hf import import_hf, open_hf
from flextron_mcore.checkpoint.reader import DTYPES, TensorReader
from flextron_mcore.checkpoint.writer import write_streaming
from flextron_mcore.config import FlextronError
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.runtime.disk import write_aside
from flextron_mcore.space import SubNetwork
from tests import hf_toy

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Path]:
    """Directories of one tiny model, saved as one file and as three shards."""
    root, model = tmp_path_factory.mktemp("hf"), hf_toy.llama()
    hf_toy.save(model, root / "single")
    hf_toy.save(model, root / "sharded", max_shard_size="60KB")
    assert (root / "sharded" / SHARD).is_file()
    return root / "single", root / "sharded"


@pytest.fixture
def single(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "single"))


@pytest.fixture
def sharded(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved[1], tmp_path / "sharded"))


def edit(folder: Path, **changes) -> None:
    """Change entries of config.json in `folder`."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the tensors of the single safetensors file in `folder`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def fails(folder: Path, *words: object) -> None:
    with pytest.raises(FlextronError) as caught:
        open_hf(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


def test_stored_and_chosen_dtype(single, tmp_path):
    assert open_hf(single).dtype == "fp32"
    info, tensors = import_hf(single, {"granularity": 1}, "bf16")
    assert info.dtype == "bf16" and {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert {tensor.load().dtype for tensor in tensors.values()} == {torch.bfloat16}
    rewrite(single, lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))
    assert open_hf(single).dtype == "fp16"
    info = hf_toy.checkpoint(single, tmp_path / "run")
    reader = TensorReader(info)
    assert info.dtype == "fp16" and {reader.read(key).dtype for key in reader.keys()} == {torch.float16}


def test_mixed_dtypes_keep_that_of_most_weights(single):
    def narrow_all_but_one(tensors):
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items() if name != "model.norm.weight"})

    rewrite(single, narrow_all_but_one)
    hf = open_hf(single)
    assert hf.dtype == "bf16" and hf.stored_otherwise("bf16") == ["model.norm.weight"] and not hf.stored_otherwise("fp32")
    stored = load_file(single / "model.safetensors")["model.norm.weight"]
    for dtype in ("fp32", None):
        _, tensors = import_hf(single, {"granularity": 1}, dtype)
        found = tensors["decoder.final_layernorm.weight"].load()
        assert torch.equal(found, stored if dtype else stored.bfloat16())


@pytest.mark.parametrize(
    "stored, value, dtype, words",
    [
        (torch.float32, float("nan"), None, ["NaN or infinite weights"]),
        (torch.bfloat16, float("inf"), None, ["NaN or infinite weights"]),
        (torch.float32, -7e4, "fp16", ["holds a weight of 7e+04, more than float16 holds", "set dtype to bf16 or fp32"]),
        (torch.float32, 3.4e38, "bf16", ["more than bfloat16 holds", "set dtype to fp32"]),
        (torch.float64, 1e300, None, ["holds a weight of 1e+300, more than fp32 holds: copy the file again"]),
    ],
)
def test_weights_that_are_not_finite(single, stored, value, dtype, words):
    def spoil(tensors):
        tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()})
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value

    rewrite(single, spoil)
    _, tensors = import_hf(single, {"granularity": 1}, dtype)
    with pytest.raises(FlextronError) as caught:
        tensors["decoder.layers.1.mlp.linear_fc2.weight"].load()
    for word in ["model.safetensors: tensor model.layers.1.mlp.down_proj.weight", *words]:
        assert word in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_dtype_is_refused(single):
    with pytest.raises(FlextronError, match="dtype='int8' is not known: use one of fp32, bf16, fp16"):
        import_hf(single, None, "int8")
    assert "int8" not in DTYPES


def test_a_tensor_that_the_family_does_not_declare_is_refused(single):
    """An undeclared tensor is refused, since it would be lost. Buffers that transformers 4 stored are ignored."""
    rewrite(single, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    open_hf(single)
    rewrite(single, lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}))
    fails(single, single / "model.safetensors", "holds 1 tensor(s)", "LlamaForCausalLM", "layers.9.mlp.up_proj.weight")


def test_two_names_of_one_tensor_are_refused(single):
    """Two names of one tensor are refused: transformers would take the one with the prefix, an import the one that comes last."""
    rewrite(single, lambda tensors: tensors.update({"norm.weight": torch.ones(48)}))
    fails(single, single / "model.safetensors", "holds norm.weight with and without the prefix model.", "remove the one")


def test_an_adapter_is_refused(single):
    (single / "adapter_config.json").write_text("{}")
    fails(single, single / "adapter_config.json", "an adapter is not applied: merge it", "or remove this file")


def test_space_and_config_are_kept(single):
    info, _ = import_hf(single, {"granularity": 1, "attention_unit": "query_head", "heads": [4, 8]})
    assert info.space.heads == (4, 8) and info.space.attention_unit == "query_head"
    assert info.hf_config["eos_token_id"] == 5 and not info.sorted and info.step == 0


@pytest.mark.parametrize("named", [None, []])
def test_the_model_type_decides_where_no_architecture_is_named(single, named):
    edit(single, architectures=named)
    assert open_hf(single).model.activation == "swiglu"


def test_a_directory_without_config_is_refused(tmp_path):
    fails(tmp_path / "none", tmp_path / "none", "no such directory")
    fails(tmp_path, tmp_path / "config.json", "no such file")
    (tmp_path / "config.json").write_text("{'a': 1}")
    fails(tmp_path, tmp_path / "config.json", "not readable as JSON")
    (tmp_path / "config.json").write_text("[]")
    fails(tmp_path, tmp_path / "config.json", "not a JSON object")


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            ["architecture MambaForCausalLM", "LlamaForCausalLM, Mistral", "GPT2LMHeadModel"],
        ),
        ({"architectures": [], "model_type": "mamba"}, ["GPT2LMHeadModel"]),
        ({"architectures": None, "model_type": "mamba"}, ['model_type "mamba"', "LlamaForCausalLM"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantized"]),
        ({"model_type": "gpt2"}, ['architectures ["LlamaForCausalLM"] and model_type "gpt2" name different models']),
    ],
)
def test_unsupported_models_are_refused(single, changes, words):
    edit(single, **changes)
    fails(single, single / "config.json", *words)


def test_missing_weights_are_named(single, sharded):
    (single / "model.safetensors").unlink()
    fails(single, single, "no weights", "model.safetensors.index.json")
    (single / "pytorch_model.bin").touch()
    fails(single, single, "*.bin", "convert them to safetensors")
    (sharded / SHARD).unlink()
    fails(sharded, sharded / SHARD, "no such file", "index")


def test_a_wrong_index_is_named(sharded):
    index = sharded / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps({**values, "weight_map": {**values["weight_map"], "extra": SHARD}}))
    fails(sharded, sharded / SHARD, "lacks the tensor extra")
    index.write_text("{}")
    fails(sharded, index, "weight_map")
    index.write_text("no json")
    fails(sharded, index, "not readable as JSON")


def test_damaged_shards_are_named(sharded):
    shard = sharded / SHARD
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    fails(sharded, shard, f"{len(whole) - 100} bytes, expected {len(whole)}")
    shard.write_bytes(whole + b"more")
    fails(sharded, shard, f"{len(whole) + 4} bytes, expected {len(whole)}")
    shard.write_bytes(whole[:20])
    fails(sharded, shard, "20 bytes, expected more than")
    for content in (
        b"",
        b"123",
        b"\xff" * 100,
        b"version https://git-lfs.github.com/spec/v1\n",
        whole[:8] + b"x" * (len(whole) - 8),
    ):
        shard.write_bytes(content)
        fails(sharded, shard, "not a safetensors file, or damaged", f"{len(content)} bytes")


def test_a_shard_cut_off_after_it_was_opened_is_named(single):
    hf = open_hf(single)
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(FlextronError, match="damaged"):
        for tensor in hf.sources.values():
            tensor.read()


def test_weights_of_another_model_are_refused(single):
    rewrite(single, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    fails(single, single, "lack the tensor model.layers.1.mlp.up_proj.weight")
    edit(single, num_hidden_layers=1, intermediate_size=44)
    fails(single, single / "model.safetensors", "model.layers.0.mlp.", "[40, 48]", "[44, 48]")


def test_an_untied_output_layer_must_be_stored(single):
    rewrite(single, lambda tensors: tensors.pop("lm_head.weight"))
    fails(single, single, "lack the tensor lm_head.weight")
    edit(single, tie_word_embeddings=True)
    open_hf(single)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("case", ["equal", "other", "head only", "last row differs"])
def test_an_output_layer_that_config_json_ties(tmp_path, family, case):
    """For every combination of stored tensors, the import and its export compute what transformers computes."""
    folder = hf_toy.save(getattr(hf_toy, family)(tie_word_embeddings=False), tmp_path / "hf")
    edit(folder, tie_word_embeddings=True)
    words = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}[family]

    def change(tensors):
        if case in ("equal", "last row differs"):
            tensors["lm_head.weight"] = tensors[words].clone()
        if case == "head only":
            del tensors[words]
        if case == "last row differs":
            tensors["lm_head.weight"][-1, -1] += 1

    rewrite(folder, change)
    theirs = hf_toy.load(folder)
    info = hf_toy.checkpoint(folder, tmp_path / "run")
    tied = case in ("equal", "head only")
    assert info.model.share_embeddings_and_output_weights == tied == open_hf(folder).tied
    torch.testing.assert_close(hf_toy.logits(hf_toy.megatron(info)), hf_toy.logits(theirs), atol=hf_toy.ATOL, rtol=0)
    (tmp_path / "back").mkdir()
    get_format("hf").write(Job(info, SubNetwork.full(info.model), tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] == tied
    back = hf_toy.load(tmp_path / "back")
    torch.testing.assert_close(hf_toy.logits(back), hf_toy.logits(theirs), atol=hf_toy.ATOL, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary(tmp_path, tied):
    """Old tokens keep their logits. New rows are the mean around which transformers' resize_token_embeddings draws its rows."""
    theirs = hf_toy.llama(tie_word_embeddings=tied)
    folder = hf_toy.save(theirs, tmp_path / "hf")
    hf = open_hf(folder).resized(hf_toy.VOCAB + 3)
    info, tensors = import_hf(hf, {"granularity": 1})
    assert info.model.vocab_size == hf_toy.VOCAB + 3 and len(tensors) == len(import_hf(folder, {"granularity": 1})[1])
    torch.manual_seed(0)
    theirs.resize_token_embeddings(hf_toy.VOCAB + 3)
    expected = theirs.state_dict()
    for ours, name in {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "output_layer.weight": "lm_head.weight",
    }.items():
        if ours in tensors:
            found = tensors[ours].load()
            assert torch.equal(found[: hf_toy.VOCAB], expected[name][: hf_toy.VOCAB])
            torch.testing.assert_close(found[hf_toy.VOCAB :], expected[name][hf_toy.VOCAB :], atol=1e-3, rtol=0)
    target = tmp_path / "run" / "checkpoints" / "iter_0000000"
    with write_aside(target) as out:
        write_streaming(out, info, tensors)
    found = hf_toy.logits(hf_toy.megatron(replace(info, path=target)))
    torch.testing.assert_close(found, hf_toy.logits(theirs), atol=1e-2, rtol=0)
    torch.testing.assert_close(found[..., : hf_toy.VOCAB], hf_toy.logits(theirs)[..., : hf_toy.VOCAB], atol=hf_toy.ATOL, rtol=0)


def test_quantized_weights_are_refused(single):
    rewrite(single, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    fails(single, single / "model.safetensors", "I8", "quantized")
