"""format=megatron: exported by two ranks, and loaded on two tensor-parallel ranks by Megatron-Core's own layers."""

from __future__ import annotations

import importlib.util

import torch

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.space import ElasticSpace, SubNetwork, count_parameters
from tests import toy
from tests.parallel.worker import run_jobs


def stock_logits(directory: str, out: str) -> None:
    """Save logits computed by the exported code on two tensor-parallel ranks."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from flextron_mcore.runtime import distributed

    distributed.initialize(LayoutSettings(tensor_model_parallel_size=2))
    spec = importlib.util.spec_from_file_location("load_model", f"{directory}/load_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    gpt = module.load(use_cpu_initialization=True, tensor_model_parallel_size=2).eval()
    with torch.no_grad():
        logits = gather_from_tensor_model_parallel_region(module.logits(gpt, toy.inputs()[0]))
    torch.save(logits[..., : toy.VOCAB], f"{out}.{torch.distributed.get_rank()}")


def test_two_ranks_export_and_load_the_network(tmp_path):
    arch = toy.config(num_attention_heads=8, num_query_groups=4)
    space = ElasticSpace.build(arch, granularity=2, heads=[0.5, 1.0])
    model = toy.model(arch, space)
    toy.write(model, CheckpointInfo(arch, space), tmp_path / "run")
    small, large = space.layer_choice(arch, 4, 24), space.layer_choice(arch, 8, 48)
    nets = {"uniform": (small, small), "ffn": (small, space.layer_choice(arch, 4, 48)), "heads": (small, large)}
    nets = {name: SubNetwork(arch.hidden_size, layers) for name, layers in nets.items()}
    layout = "model.tensor_model_parallel_size=2"
    jobs = []
    for name, net in nets.items():
        (tmp_path / f"{name}.json").write_text(net.to_json())
        keys = [f"checkpoint={tmp_path}/run", f"subnetwork={tmp_path}/{name}.json", "format=megatron", f"out={tmp_path}/{name}"]
        verify = f"verify={str(name == 'heads').lower()}"  # verification runs on one rank, with both process groups alive
        jobs.append({"stage": "export", "keys": [*keys, layout, verify], "layout": "tp2"})
        call = {"call": "tests.parallel.test_export:stock_logits", "layout": "tp2"}
        jobs.append({**call, "arguments": {"directory": f"{tmp_path}/{name}", "out": f"{tmp_path}/{name}.logits"}})
    (tmp_path / "jobs").mkdir()
    results = run_jobs(2, jobs, tmp_path / "jobs")
    assert not [rank["error"] for job in results for rank in job if "error" in rank]
    tokens, positions = toy.inputs()
    for (name, net), (ours, _) in zip(nets.items(), results[::2], strict=True):
        figures = ours["result"]
        assert figures["parameters"] == count_parameters(arch, net)
        assert name != "heads" or figures["max_logit_difference"] < 1e-5
        with torch.no_grad(), use_subnetwork(model, net):
            expected = model(tokens, positions, None)
        for rank in range(2):
            found = torch.load(f"{tmp_path}/{name}.logits.{rank}")
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=f"{name}, rank {rank}")
