"""Opening a Hugging Face directory: dtypes, leftovers, the tokenizer, and everything that can be wrong with the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flextron_mcore.checkpoint.hf import copy_tokenizer, import_hf, open_hf
from flextron_mcore.checkpoint.reader import DTYPES, TensorReader
from flextron_mcore.config import FlextronError
from tests import hf_toy

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Path]:
    """The same tiny model in one file and in three."""
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
    """Change values of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite(folder: Path, change) -> None:
    """Change the stored tensors of the single file."""
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


def test_mixed_dtypes_are_widened_not_narrowed(single):
    def narrow_all_but_one(tensors):
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items() if name != "model.norm.weight"})

    rewrite(single, narrow_all_but_one)
    info, tensors = import_hf(single, {"granularity": 1})
    assert info.dtype == "fp32"
    assert torch.equal(
        tensors["decoder.final_layernorm.weight"].load(), load_file(single / "model.safetensors")["model.norm.weight"]
    )


def test_unknown_dtype(single):
    with pytest.raises(FlextronError, match="dtype='int8' is not known: use one of fp32, bf16, fp16"):
        import_hf(single, None, "int8")
    assert "int8" not in DTYPES


def test_a_tensor_that_the_family_does_not_declare(single):
    """It would be lost in silence; buffers that transformers 4 stored are no weights."""
    rewrite(single, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    open_hf(single)
    rewrite(single, lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}))
    fails(single, single / "model.safetensors", "holds 1 tensor(s)", "LlamaForCausalLM", "layers.9.mlp.up_proj.weight")


def test_space_and_config_are_kept(single):
    info, _ = import_hf(single, {"granularity": 1, "attention_unit": "query_head", "heads": [4, 8]})
    assert info.space.heads == (4, 8) and info.space.attention_unit == "query_head"
    assert info.hf_config["eos_token_id"] == 5 and not info.sorted and info.step == 0


def test_the_model_type_decides_where_no_architecture_is_named(single):
    edit(single, architectures=None)
    assert open_hf(single).model.activation == "swiglu"


def test_tokenizer_files_are_copied(tmp_path):
    source, target = tmp_path / "hf", tmp_path / "run" / "tokenizer"
    source.mkdir()
    (source / "generation_config.json").write_text("{}")
    assert not copy_tokenizer(source, target) and not target.exists()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "model.safetensors"):
        (source / name).write_text(name)
    assert copy_tokenizer(source, target)
    assert {file.name for file in target.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }


def test_no_directory_no_config(tmp_path):
    fails(tmp_path / "none", tmp_path / "none", "no such directory")
    fails(tmp_path, tmp_path / "config.json", "no such file")
    (tmp_path / "config.json").write_text("{'a': 1}")
    fails(tmp_path, tmp_path / "config.json", "not readable as JSON")
    (tmp_path / "config.json").write_text("[]")
    fails(tmp_path, tmp_path / "config.json", "not a JSON object")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"architectures": ["MambaForCausalLM"]}, ["architecture MambaForCausalLM", "LlamaForCausalLM, GPT2LMHeadModel"]),
        ({"architectures": [], "model_type": "mamba"}, ["GPT2LMHeadModel"]),
        ({"architectures": None, "model_type": "mamba"}, ["model_type 'mamba'", "LlamaForCausalLM"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantized"]),
    ],
)
def test_unsupported_models(single, changes, words):
    edit(single, **changes)
    fails(single, single / "config.json", *words)


def test_weights_that_are_not_there(single, sharded):
    (single / "model.safetensors").unlink()
    fails(single, single, "no weights", "model.safetensors.index.json")
    (single / "pytorch_model.bin").touch()
    fails(single, single, "*.bin", "convert them to safetensors")
    (sharded / SHARD).unlink()
    fails(sharded, sharded / SHARD, "no such file", "index")


def test_an_index_that_is_wrong(sharded):
    index = sharded / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps({**values, "weight_map": {**values["weight_map"], "extra": SHARD}}))
    fails(sharded, sharded / SHARD, "lacks the tensor extra")
    index.write_text("{}")
    fails(sharded, index, "weight_map")
    index.write_text("no json")
    fails(sharded, index, "not readable as JSON")


def test_damaged_shards(sharded):
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


def test_a_shard_cut_off_after_it_was_opened(single):
    hf = open_hf(single)
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(FlextronError, match="damaged"):
        for tensor in hf.sources.values():
            tensor.read()


def test_weights_of_another_model(single):
    rewrite(single, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    fails(single, single, "lack the tensor model.layers.1.mlp.up_proj.weight")
    edit(single, num_hidden_layers=1, intermediate_size=44)
    fails(single, single / "model.safetensors", "model.layers.0.mlp.", "[40, 48]", "[44, 48]")


def test_an_untied_output_layer_that_is_not_stored(single):
    rewrite(single, lambda tensors: tensors.pop("lm_head.weight"))
    fails(single, single, "lack the tensor lm_head.weight")
    edit(single, tie_word_embeddings=True)
    open_hf(single)


def test_a_tied_output_layer_may_be_stored_again(single):
    edit(single, tie_word_embeddings=True)
    hf = open_hf(single)
    assert "lm_head.weight" not in hf.sources


def test_quantized_weights(single):
    rewrite(single, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    fails(single, single / "model.safetensors", "I8", "quantized")
