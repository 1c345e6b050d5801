"""TensorRT-LLM checkpoints, without building an engine.

Read back, they have the logits of the sub-network in Megatron-Core; each tensor equals that of Megatron-Core's own converter.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.data.tokenizer import train_tokenizer
from flextron_mcore.exports import cut as cutting
from flextron_mcore.exports.cut import cut
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.exports.trtllm import pieces
from flextron_mcore.exports.trtllm.plan import make_plan
from flextron_mcore.settings.formats import TrtllmSettings
from flextron_mcore.space import ElasticSpace, LayerChoice, SubNetwork, count_parameters
from tests import hf_toy, toy
from tests.exports.test_hf import CASES, networks

FORMAT = get_format("trtllm")


def exported(info: CheckpointInfo, net: SubNetwork, out: Path, tp: int = 1, pp: int = 1, style: str = "padded", **changes):
    """Export a network with these parallel sizes and this style, and return (figures of the export, job)."""
    out.mkdir()
    job = Job(info, net, out, settings=TrtllmSettings(style, tp, pp), **changes)
    return FORMAT.write(job), job


def read(out: Path) -> tuple[dict, list[dict[str, torch.Tensor]]]:
    config = json.loads((out / "config.json").read_text())
    return config, [load_file(out / f"rank{rank}.safetensors") for rank in range(config["mapping"]["world_size"])]


def made(arch: ModelConfig, space: ElasticSpace, folder: Path, seed: int = 0) -> CheckpointInfo:
    """Write the checkpoint of a random model."""
    info = CheckpointInfo(arch, space, sorted=True)
    return replace(info, path=toy.write(toy.model(arch, space, seed), info, folder))


def difference(info: CheckpointInfo, job: Job) -> float:
    """Largest difference of logits between the files and Megatron-Core.

    The reference is an elastic model with the hidden size and depth of job.net and full widths, set to the widths of job.net.
    """
    layers = job.net.executed_layers
    full = SubNetwork.full(info.model).layers
    wide = tuple(replace(layer, executed=ours.executed) for layer, ours in zip(full, job.net.layers, strict=True))
    arch = replace(info.model, hidden_size=job.net.hidden_size, num_layers=len(layers))
    model = toy.model(
        arch, ElasticSpace.from_dict(arch, info.space.to_dict() | {"hidden_size": [1.0], "depth": [1.0], "layer_ranking": None})
    )
    ours = toy.memory_names(model)
    with torch.no_grad():
        for name, tensor in cut(info, SubNetwork(job.net.hidden_size, wide)).items():
            ours.pop(name).copy_(tensor.load())
        assert ours.keys() <= {"output_layer.weight"}  # the output layer is missing where it is tied to the embedding
        tokens, positions = toy.inputs()
        with use_subnetwork(model, SubNetwork(job.net.hidden_size, tuple(layers))):
            expected = model(tokens, positions, None)
    assert expected.std() > 0.1
    return (FORMAT.logits(job, job.net, tokens) - expected).abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_the_files_compute_what_the_sub_network_computes(case, tmp_path):
    make, options, space = CASES[case]
    theirs = make(**options)
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run", space)
    model = hf_toy.megatron(info)
    llama = case.startswith("llama")
    for name, net in networks(info).items():
        expected = hf_toy.logits(model, net)
        for style in ("padded", "deci") if llama and "biases" not in case else ("padded",):
            for tp, pp in ((1, 1), (2, 2)):
                where = f"{name}, {style}, {tp} x {pp}"
                figures, job = exported(info, net, tmp_path / where.replace(" ", "_"), tp, pp, style)
                found = FORMAT.logits(job, net, hf_toy.tokens())
                torch.testing.assert_close(found, expected, atol=hf_toy.ATOL, rtol=0, msg=where)
                assert figures["parameters"] == count_parameters(info.model, net) <= figures["padded_parameters"]
                wanted = {"padded": "LlamaForCausalLM" if llama else "GPTForCausalLM", "deci": "DeciLMForCausalLM"}
                assert figures["architecture"] == wanted[style]
                files = [file for file in job.out.rglob("*") if file.is_file()]
                assert (figures["files"], figures["bytes"]) == (len(files), sum(file.stat().st_size for file in files))
                card = (job.out / "README.md").read_text()
                assert f"{figures['parameters']:,}" in card and f"{figures['padded_parameters']:,}" in card


@settings(max_examples=10, deadline=None)
@given(data=st.data(), llama=st.booleans(), bias=st.booleans(), tied=st.booleans(), seed=st.integers(0, 9))
def test_any_shape_is_the_sub_network(data, llama, bias, tied, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    draw = lambda name, *values: data.draw(st.sampled_from(values), name)  # noqa: E731
    groups, queries, layers = draw("groups", 2, 3, 4), draw("queries", 1, 2, 3), draw("layers", 1, 2, 3)
    tp, pp, unit = draw("tp", 1, 2), draw("pp", 1, 2), draw("unit", "kv_group", "query_head")
    families = {
        True: {"normalization": "rmsnorm", "activation": "swiglu", "position_embedding_type": "rope"},
        False: {
            "normalization": draw("norm", "layernorm", "layernorm1p"),
            "activation": draw("activation", "gelu_tanh", "relu", "squared-relu", "swiglu"),
            "position_embedding_type": draw("position", "learned_absolute", "rope"),
        },
    }
    arch = toy.config(
        **families[llama], num_layers=layers, hidden_size=24, ffn_hidden_size=20, num_attention_heads=groups * queries,
        num_query_groups=groups, kv_channels=draw("size", 4, 6), bias=bias, share_embeddings_and_output_weights=tied,
    )  # fmt: skip
    step = queries if unit == "kv_group" else groups
    space = ElasticSpace.build(
        arch, 1, unit, list(range(step, groups * queries + 1, step)), [2, 7, 10, 20], [16, 24], list(range(1, layers + 1))
    )
    net = toy.random_network(arch, replace(space, sizes={**space.sizes, "depth": (layers,)}), seed)
    executed = data.draw(st.lists(st.booleans(), min_size=layers, max_size=layers).filter(any), "executed")
    chosen = tuple(replace(layer, executed=run) for layer, run in zip(net.layers, executed, strict=True))
    net = SubNetwork(draw("hidden", 16, 24), chosen)
    info = made(arch, space, folder / "run", seed)
    style = draw("style", "padded", "deci") if llama and not bias else "padded"
    try:
        figures, job = exported(info, net, folder / "out", tp, pp, style)
    except FlextronError as error:
        assert ("tensor_parallel_size=2: layers[" in str(error) and tp == 2) or "is more than the" in str(error)
        return
    assert difference(info, job) < 1e-5 * (10 if arch.activation == "squared-relu" else 1)
    assert figures["parameters"] == count_parameters(arch, net)


def converted(monkeypatch, arch: ModelConfig, tensors: dict[str, torch.Tensor], layer: LayerChoice, tp: int):
    """Weights of every rank that Megatron-Core's converter makes of a model whose layers all have the widths of `layer`."""
    from megatron.core.export.data_type import DataType
    from megatron.core.export.export_config import ExportConfig
    from megatron.core.export.trtllm.model_to_trllm_mapping.default_conversion_dict import DEFAULT_CONVERSION_DICT
    from megatron.core.export.trtllm.trtllm_weights_converter.single_device_trtllm_model_weights_converter import (
        SingleDeviceTRTLLMModelWeightsConverter,
    )

    helpers = ModuleType("tensorrt_llm._utils")
    helpers.pad_vocab_size = lambda size, ranks: -(-size // ranks) * ranks
    helpers.str_dtype_to_torch = lambda name: getattr(torch, name)
    monkeypatch.setitem(sys.modules, "tensorrt_llm._utils", helpers)
    config = SimpleNamespace(
        num_query_groups=layer.kv_groups, num_attention_heads=layer.num_attention_heads, kv_channels=arch.kv_channels,
        layernorm_zero_centered_gamma=arch.normalization == "layernorm1p", num_moe_experts=None, num_layers=arch.num_layers,
        normalization="RMSNorm" if arch.normalization == "rmsnorm" else "LayerNorm", gated_linear_unit=arch.gated,
    )  # fmt: skip
    converter = SingleDeviceTRTLLMModelWeightsConverter(
        ExportConfig(inference_tp_size=tp), config, DataType.float32, activation=arch.activation
    )
    converter.convert({name: tensor.clone() for name, tensor in tensors.items()}, dict(DEFAULT_CONVERSION_DICT))
    for rank in range(tp):
        mapping = SimpleNamespace(
            tp_size=tp, tp_rank=rank, pp_layers=lambda layers: list(range(layers)), is_first_pp_rank=lambda: True,
            is_last_pp_rank=lambda: True,
        )  # fmt: skip
        yield converter.get_local_model_weights_per_gpu(mapping, SimpleNamespace())


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    "family",
    [
        toy.LLAMA,
        toy.LLAMA | {"bias": True},
        toy.GPT2,
        toy.GPT2 | {"normalization": "layernorm1p", "activation": "squared-relu", "share_embeddings_and_output_weights": True},
        toy.GPT2 | {"activation": "swiglu", "position_embedding_type": "rope", "bias": False},
    ],
    ids=["llama", "llama, biases", "gpt", "gpt 1p, tied", "gpt, gated"],
)
def test_tensors_are_those_of_megatron_cores_converter(family, tp, tmp_path, monkeypatch):
    """Each layer is exported as a network of its own, so that nothing is padded and all tensors can be compared."""
    arch = toy.config(**family, num_attention_heads=8, num_query_groups=4, num_layers=3, kv_channels=6, vocab_size=68)
    space = ElasticSpace.build(arch, 1, "kv_group", [2, 4, 8], [12, 20, 48])
    info = made(arch, space, tmp_path / "run", seed=tp)
    compared = 0
    for heads, ffn in ((4, 20), (8, 12), (2, 48)):
        if heads % tp:
            continue
        net = space.uniform(arch, heads, ffn)
        figures, job = exported(info, net, tmp_path / f"{heads}", tp)
        _, ranks = read(job.out)
        tensors = {name: tensor.load() for name, tensor in cut(info, net).items()}
        assert tp > 1 or figures["parameters"] + 68 * 32 * arch.share_embeddings_and_output_weights == sum(
            tensor.numel() for tensor in ranks[0].values()
        )
        for ours, theirs in zip(ranks, converted(monkeypatch, arch, tensors, net.layers[0], tp), strict=True):
            if arch.share_embeddings_and_output_weights:  # their converter leaves a tied output layer to the loader
                lm_head = ours.pop("lm_head.weight")
                assert lm_head.shape == (68 // tp, 32)
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                assert torch.equal(ours[name], tensor), name
            compared += len(theirs)
    assert compared > 60


@pytest.mark.parametrize("style", ["padded", "deci"])
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_padding_is_zeros_and_the_rest_is_the_networks(style, unit, tmp_path):
    """With layers of different widths, every weight of the sub-network is in the files once; everything else is zero."""
    arch = toy.config(num_attention_heads=8, num_query_groups=4, num_layers=3, kv_channels=6)
    space = ElasticSpace.build(arch, 1, unit, [2, 4, 8] if unit == "kv_group" else [4, 8], [12, 20, 48])
    heads = [4, 8, 2] if unit == "kv_group" else [4, 8, 4]
    net = SubNetwork(32, tuple(space.layer_choice(arch, h, f) for h, f in zip(heads, (48, 20, 12), strict=True)))
    info = made(arch, space, tmp_path / "run")
    figures, job = exported(info, net, tmp_path / "out", style=style)
    config, (tensors,) = read(job.out)
    kept = [tensor.load().flatten() for tensor in cut(info, net).values()]
    stored = torch.cat([tensor.flatten() for tensor in tensors.values()])
    assert torch.equal(stored[stored != 0].sort().values, torch.cat(kept).sort().values)
    assert figures["padded_parameters"] == len(stored) > figures["parameters"] == sum(map(len, kept))
    mlp = "ffn" if style == "deci" else "mlp"
    widths = [len(tensors[f"transformer.layers.{i}.{mlp}.fc.weight"]) for i in range(3)]
    rows = [len(tensors[f"transformer.layers.{i}.attention.qkv.weight"]) // 6 for i in range(3)]
    if style == "padded":
        assert (widths, rows) == ([48] * 3, [8 + 2 * 4] * 3)
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (8, 4, 48)
        assert "layer_configs" not in config
    else:
        groups = [layer.kv_groups for layer in net.layers]
        assert (widths, rows) == ([48, 20, 12], [8 + 2 * g for g in groups])  # true widths and KV heads
        assert [layer["attention"] for layer in config["layer_configs"]] == [
            {"impl": "attention", "num_key_value_heads": g} for g in groups
        ]
        assert [layer["ffn"] for layer in config["layer_configs"]] == [
            {"impl": "mlp", "intermediate_size": f} for f in (48, 20, 12)
        ]


def test_deci_takes_kv_heads_that_divide_the_query_heads():
    arch = toy.config(num_attention_heads=8, num_query_groups=4, num_layers=4)
    layers = tuple(LayerChoice(True, groups, 2, 48) for groups in (3, 4, 1, 2))
    plan = make_plan(arch, SubNetwork(32, layers), TrtllmSettings("deci"))
    assert [(slot.kv_groups, slot.query_heads_per_group) for slot in plan.slots] == [(4, 2), (4, 2), (1, 8), (2, 4)]


def test_the_config_has_the_keys_of_tensorrt_llm(tmp_path):
    scaling = {
        "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16
    }  # fmt: skip
    arch = toy.config(
        rope_scaling=scaling, rotary_base=500.0, layernorm_epsilon=1e-3, kv_channels=6, num_layers=3, vocab_size=67, bias=True
    )
    space = ElasticSpace.build(arch, 1, "kv_group", [2, 4], [20, 48], [24, 32], [2, 3])
    info = made(arch, space, tmp_path / "run")
    full = SubNetwork.full(arch)
    net = SubNetwork(24, (full.layers[0], replace(full.layers[1], executed=False), space.layer_choice(arch, 2, 20)))
    _, job = exported(info, net, tmp_path / "out", tp=2, dtype="bf16")
    config, ranks = read(job.out)
    assert config == {
        "architecture": "LlamaForCausalLM", "dtype": "bfloat16", "logits_dtype": "float32", "vocab_size": 67, "hidden_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_size": 6, "intermediate_size": 48,
        "hidden_act": "silu", "norm_epsilon": 1e-3, "position_embedding_type": "rope_gpt_neox", "max_position_embeddings": 24,
        "rotary_base": 500.0, "rotary_scaling": {**scaling, "rope_type": "llama3"}, "qk_layernorm": False,
        "use_parallel_embedding": False, "embedding_sharding_dim": 0, "attn_bias": True, "mlp_bias": True,
        "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }  # fmt: skip
    assert {tensor.dtype for rank in ranks for tensor in rank.values()} == {torch.bfloat16}
    assert [rank["lm_head.weight"].shape for rank in ranks] == [(34, 24)] * 2 and not ranks[1]["lm_head.weight"][-1].any()
    assert ranks[0]["transformer.vocab_embedding.weight"].shape == (67, 24)
    _, job = exported(info, net, tmp_path / "fp32", tp=2)
    assert difference(info, job) < 1e-5


def test_pipeline_stages_share_the_layers(tmp_path):
    """Remaining layers go to the first stages; layer indices restart; embedding and output layer are on the ends only."""
    arch = toy.config(**toy.GPT2, num_layers=5)
    info = made(arch, ElasticSpace.build(arch, 1, "kv_group", [1.0], [1.0]), tmp_path / "run")
    _, job = exported(info, SubNetwork.full(arch), tmp_path / "out", tp=2, pp=3)
    _, ranks = read(job.out)
    layers = [{name.split(".")[2] for name in rank if ".layers." in name} for rank in ranks]
    assert layers == [{"0", "1"}] * 4 + [{"0"}] * 2
    ends = [sorted(name for name in rank if ".layers." not in name) for rank in ranks]
    assert ends[:2] == [["transformer.position_embedding.weight", "transformer.vocab_embedding.weight"]] * 2
    assert ends[2:] == [[]] * 2 + [["lm_head.weight", "transformer.ln_f.bias", "transformer.ln_f.weight"]] * 2
    assert difference(info, job) < 1e-5


def test_gelu_is_what_tensorrt_llm_makes_of_it(tmp_path):
    arch = toy.config(**toy.GPT2 | {"activation": "gelu"})
    info = made(arch, ElasticSpace.build(arch, 1, "kv_group", [1.0], [1.0]), tmp_path / "run")
    figures, job = exported(info, SubNetwork.full(arch), tmp_path / "out")
    assert 1e-5 < difference(info, job) < FORMAT.tolerance(job) and "tanh" in figures["note"]
    tanh = replace(info, model=replace(arch, activation="gelu_tanh"))
    figures, job = exported(tanh, SubNetwork.full(arch), tmp_path / "tanh")
    assert "note" not in figures and FORMAT.tolerance(job) < 1e-3
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "tanh" / "config.json").read_text()


def test_one_tensor_in_memory_at_a_time(tmp_path, monkeypatch):
    """At any number of layers, a tensor is read only after the one before it is in the file."""
    arch = toy.config(num_layers=3)
    info = made(arch, ElasticSpace.build(arch, 1, "kv_group", [1.0], [1.0]), tmp_path / "run")
    events, seen, load, write = [], [], cutting._load, pieces.TensorFile.write
    monkeypatch.setattr(cutting, "_load", lambda *a: events.append("read") or load(*a))
    monkeypatch.setattr(pieces.TensorFile, "write", lambda *a: events.append("write") or write(*a))
    _, job = exported(info, SubNetwork.full(arch), tmp_path / "out", tp=2, progress=seen.append)
    reads = 3 + 3 * 6
    assert events.count("read") == reads  # each tensor is read once for both ranks
    assert max(len(run) for run in "".join(e[0] for e in events).split("w")) == 1  # no two reads in a row
    stored = sum(file.stat().st_size for file in job.out.glob("*.safetensors"))
    assert len(seen) == reads and 0 < stored - sum(seen) < 8000  # the rest are the headers


@pytest.mark.parametrize("processes", [2, 5, 7])
def test_processes_share_the_files(processes, tmp_path, monkeypatch):
    arch = toy.config(**toy.GPT2, num_layers=3)
    info = made(arch, ElasticSpace.build(arch, 1, "kv_group", [1.0], [1.0]), tmp_path / "run")
    _, job = exported(info, SubNetwork.full(arch), tmp_path / "out", tp=2, pp=3)
    plan, seen = make_plan(arch, job.net, job.settings), []
    for process in range(processes):
        out = tmp_path / f"{process}"
        out.mkdir()
        monkeypatch.setattr(pieces, "place", lambda process=process: (process, processes))
        pieces.write_ranks(out, plan, cut(info, job.net), torch.float32, None)
        for file in out.iterdir():
            assert file.read_bytes() == (job.out / file.name).read_bytes()
            seen.append(file.name)
    assert sorted(seen) == [f"rank{rank}.safetensors" for rank in range(6)]


def test_the_tokenizer_goes_along(tmp_path):
    arch = toy.config()
    info = made(arch, ElasticSpace.build(arch, 1, "kv_group", [1.0], [1.0]), tmp_path / "run")
    train_tokenizer(["a b c d"], 257).save(tmp_path / "run" / "tokenizer")
    _, job = exported(info, SubNetwork.full(arch), tmp_path / "out")
    assert (job.out / "tokenizer" / "tokenizer.json").is_file()
    assert "--tokenizer PATH/tokenizer" in (job.out / "README.md").read_text()


@pytest.mark.parametrize(
    "family, options, words",
    [
        (toy.LLAMA, {"pipeline_parallel_size": 3}, "trtllm.pipeline_parallel_size=3 is more than the 2 layers"),
        (toy.LLAMA | {"activation": "relu"}, {}, "rmsnorm with activation=relu"),
        (toy.LLAMA | {"position_embedding_type": "learned_absolute"}, {}, "rmsnorm with learned ones"),
        (toy.LLAMA | {"bias": True}, {"style": "deci"}, "DeciLMForCausalLM has no biases"),
        (toy.GPT2, {"style": "deci"}, "DeciLMForCausalLM needs rmsnorm, this model has layernorm"),
        (toy.LLAMA, {"tensor_parallel_size": 8}, "layers[0] has 4 query heads, which it does not divide"),
        (toy.LLAMA, {"tensor_parallel_size": 4, "style": "deci"}, "layers[2] has 18 neurons, which it does not divide"),
        (
            toy.LLAMA | {"num_attention_heads": 6, "num_query_groups": 3, "kv_channels": 6},
            {"tensor_parallel_size": 2},
            "layers[0] has 3 KV heads",
        ),
    ],
)
def test_networks_that_trtllm_cannot_hold_are_refused(family, options, words):
    arch = toy.config(**family, num_layers=3)
    full = SubNetwork.full(arch).layers[0]
    net = SubNetwork(32, (full, replace(full, executed=False), replace(full, ffn_hidden_size=18)))
    with pytest.raises(FlextronError) as caught:
        make_plan(arch, net, TrtllmSettings(**options))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_padding_may_make_a_layer_divisible(tmp_path):
    """Padded to the widest layer, sizes divide by the tensor-parallel size although a layer's own do not."""
    arch = toy.config(num_attention_heads=4, num_query_groups=4)
    space = ElasticSpace.build(arch, 1, "kv_group", [3, 4], [9, 48])
    net = SubNetwork(32, (space.layer_choice(arch, 3, 9), space.layer_choice(arch, 4, 48)))
    info = made(arch, space, tmp_path / "run")
    _, job = exported(info, net, tmp_path / "out", tp=4)
    assert difference(info, job) < 1e-5
    with pytest.raises(FlextronError, match=r"tensor_parallel_size=4: layers\[0\] has 9 neurons, which"):
        exported(info, net, tmp_path / "deci", tp=4, style="deci")
