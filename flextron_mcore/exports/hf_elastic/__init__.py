"""Export of the whole elastic model as a Hugging Face directory: every sub-network, chosen at run time (docs/many_in_one.md)."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from flextron_mcore.config import FlextronError
from flextron_mcore.exports import hf
from flextron_mcore.exports.directory import figures, load_with_own_code, write_code, write_json
from flextron_mcore.exports.formats import Format, Job, rounding
from flextron_mcore.exports.hf_elastic.family import FAMILY_FILE, build_family, read_networks, write_family
from flextron_mcore.families import coded_family, family_of_model
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.space import SubNetwork, count_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUTERS_FILE = "flextron_routers.safetensors"
_CODE = Path(__file__).parent / "code"
_COMMON = ("configuration_flextron_elastic", "flextron_family", "flextron_parts", "flextron_elastic")
_ANSWERS = 3  # networks of the table of budgets whose logits are verified


def write(job: Job) -> dict[str, Any]:
    """Write the full model with code that runs any of its sub-networks, with routers, and with a table of networks for budgets.

    Call on all ranks. The weights are those that format `hf` writes for the full model, but without the compensation of heads,
    which is in flextron_family.json. Returns format, architecture, parameters (of the full model), bytes, files, selector (that
    chose the networks for budgets) and networks (number of networks in the table). Raises FlextronError for a network that is
    not the full model, a selector that cannot be tabulated, a model of no family or without an elastic class, or a job.out that
    is not an empty directory.
    """
    info, out = job.info, job.out
    if job.net != SubNetwork.full(info.model):
        raise FlextronError(
            "format=hf_elastic: holds every sub-network: export the full model, and call set_subnetwork on the loaded model"
        )
    own = family_of_model(info.model, info.hf_config)
    declared = coded_family(info.model, own)
    if declared is None:
        raise FlextronError(f"format=hf_elastic: {own.name} has no class that holds every sub-network: use format=hf")
    family = on_main_process(lambda: build_family(job))
    hf.write_as(declared, replace(job, settings=None), None, folded=False)

    def finished() -> dict[str, Any]:
        """Turn the stock directory into an elastic one."""
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        architecture, modeling = f"FlextronElastic{declared.architecture}", f"modeling_flextron_elastic_{declared.model_type}"
        config |= {
            "architectures": [architecture],
            "model_type": f"flextron_elastic_{declared.model_type}",
            "auto_map": {
                "AutoConfig": f"{_COMMON[0]}.FlextronElastic{declared.classes}Config",
                "AutoModelForCausalLM": f"{modeling}.{architecture}",
            },
            "head_dim": info.model.kv_channels,
        }
        write_code(out, _CODE, (*_COMMON, modeling), declared)
        write_family(out / FAMILY_FILE, family)
        if job.token_routers is not None:
            save_file(job.token_routers[1], out / ROUTERS_FILE, metadata={"format": "pt"})
        (out / "README.md").write_text(_card(job, architecture, family), encoding="utf-8")
        write_json(out / "config.json", config)
        found = figures(out, "hf_elastic", architecture, count_parameters(info.model))
        return found | {"selector": family["selector"], "networks": len(family["networks"])}

    return on_main_process(finished)


def networks(job: Job) -> list[SubNetwork]:
    """Networks to verify: the full model, the smallest, some with layers of different widths, some from the table of budgets."""
    model, space = job.info.model, job.info.space
    family = json.loads((job.out / FAMILY_FILE).read_text(encoding="utf-8"))
    sizes = [(space.heads[i % len(space.heads)], space.ffn_hidden_size[-1 - i % len(space.ffn_hidden_size)]) for i in range(99)]
    choices = [space.layer_choice(model, *sizes[i % 99]) for i in range(model.num_layers)]
    ends = [(None, None), (space.hidden_size[0], None), (None, space.depth[0]), (space.hidden_size[-2:][0], space.depth[-2:][0])]
    differing = [space.network(model, choices, *end) for end in ends]
    answers = read_networks(job.info, family)
    some = answers[:: max(len(answers) // _ANSWERS, 1)][:_ANSWERS]
    smallest = space.uniform(model, space.heads[0], space.ffn_hidden_size[0], space.hidden_size[0], space.depth[0])
    return list(dict.fromkeys([SubNetwork.full(model), smallest, *differing, *some]))


def logits(job: Job, net: SubNetwork, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] in fp32 that transformers computes from the directory, loaded once for all networks.

    Call on the main process, with networks in the order of `networks(job)`: the last one frees the model.

    Args:
        job: the export.
        net: one of `networks(job)`.
        tokens_BS: token ids.
    """
    model = _loaded(job.out, (job.out / "config.json").stat().st_mtime_ns)
    model.set_subnetwork(net.to_dict())
    with torch.no_grad():
        found = model(tokens_BS).logits
    if net == networks(job)[-1]:
        _loaded.cache_clear()
    return found


@lru_cache(maxsize=1)
def _loaded(folder: Path, written: int) -> PreTrainedModel:
    """Model of a directory. written: time of writing, so that a directory written again is loaded again."""
    return load_with_own_code(folder)


FORMAT = Format(write, logits, rounding, networks)


def _card(job: Job, architecture: str, family: dict[str, Any]) -> str:
    """Text of the exported directory's README.md. family: content of flextron_family.json."""
    space, adaptive = job.info.space, family["adaptive"]
    tokens = "\nmodel.set_budget(0.6, adaptive=True)   # routers choose for every token" if adaptive else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [flextron]
---
# A Flextron model: many in one

`{architecture}`: {count_parameters(job.info.model):,} parameters in {job.dtype}, and all their sub-networks, which are chosen at
run time without reloading.

| | |
|---|---|
| query heads of a layer ({space.attention_unit}) | {", ".join(map(str, space.heads))} |
| neurons of a layer | {", ".join(map(str, space.ffn_hidden_size))} |
| hidden size | {", ".join(map(str, space.hidden_size))} |
| layers | {", ".join(map(str, space.depth))} |
| costs that budgets limit | {", ".join(family["costs"])} |
| cost of which a plain fraction is a share | {family["fraction_of"]} |
| selector of the networks | `{family["selector"]}` |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
prompt = tokenizer("The", return_tensors="pt")
model.set_budget(0.6)   # or "25ms", "3.4B", "8GiB"; None: the full model{tokens}
print(model.costs(), model.subnetwork)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
print(model.generate_speculative(prompt.input_ids, draft_budget=0.6))  # a small network drafts, the current one verifies
```
"""
