"""The Transformer Engine backend gives the logits of the local one."""

from __future__ import annotations

import pytest
import torch

from flextron_mcore.checkpoint.reader import load_model
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.config import FlextronError
from flextron_mcore.model import gpt_model, transformer_config
from flextron_mcore.space import ElasticSpace
from flextron_mcore.specs import elastic_gpt_block_spec
from tests import toy


@pytest.mark.parametrize("kind", [toy.LLAMA, toy.GPT2], ids=["llama", "gpt2"])
def test_te_is_local(kind, tmp_path, device, backend="te"):
    arch = toy.config(**kind)
    space, config = ElasticSpace.build(arch), transformer_config(arch)
    try:
        spec = elastic_gpt_block_spec(config, space, backend=backend)
    except FlextronError as error:
        pytest.skip(f"no such backend: {error}")
    except Exception as error:  # without its driver or libraries, Transformer Engine raises errors of many types
        pytest.skip(f"transformer_engine cannot be used: {type(error).__name__}: {error}")
    local = toy.model(arch, space)
    info = CheckpointInfo(arch, space, path=toy.write(local, CheckpointInfo(arch, space), tmp_path))
    other = gpt_model(arch, config, spec).to(device).eval()
    load_model(other, info)
    tokens, positions = (x.to(device) for x in toy.inputs())
    for net in (None, space.uniform(arch, 2, 24), toy.random_network(arch, space, 3)):
        with torch.no_grad():
            with use_subnetwork(local, net):
                expected = local(tokens, positions, None)
            with use_subnetwork(other, net):
                found = other(tokens, positions, None)
        torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
