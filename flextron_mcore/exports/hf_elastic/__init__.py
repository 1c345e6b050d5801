"""Export the whole elastic model as one Hugging Face directory: every sub-network, chosen at run time (docs/many_in_one.md)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from flextron_mcore.config import FlextronError
from flextron_mcore.exports import hf
from flextron_mcore.exports.directory import figures, write_json
from flextron_mcore.exports.formats import Format, Job, rounding
from flextron_mcore.exports.hf_elastic.family import FAMILY_FILE, build_family, read_networks, write_family
from flextron_mcore.families import family_of_model
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.space import SubNetwork, count_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUTERS_FILE = "flextron_routers.safetensors"
_CODE = Path(__file__).parent / "code"
_COMMON = ("configuration_flextron_elastic", "flextron_family", "flextron_parts", "flextron_elastic")
_ANSWERS = 3  # of the table, that are verified


def write(job: Job) -> dict[str, Any]:
    """Write the full model with the code, routers and tables by which it becomes any of its sub-networks. Call on all ranks.

    Weights are those that `hf` writes for the full model, under the stock model's names. Returns format, architecture, parameters
    (of the full model), bytes, files, selector (which answers budgets), networks (how many the table has).
    Raises FlextronError for a network that is not the full model, a selector that cannot be tabulated, and what `hf` refuses.
    """
    info, out = job.info, job.out
    if job.net != SubNetwork.full(info.model):
        raise FlextronError(
            "format=hf_elastic: holds every sub-network: write the full model, and set others on what it loads as"
        )
    declared = family_of_model(info.model, info.hf_config)
    if declared.classes is None:
        raise FlextronError(f"format=hf_elastic: {declared.name} has no class that holds every sub-network: use format=hf")
    family = on_main_process(lambda: build_family(job))
    hf.write(replace(job, settings=None))

    def finished() -> dict[str, Any]:
        """Turn the stock directory into an elastic one."""
        for file in out.glob("*.py"):  # of a full model that no stock class can hold
            file.unlink()
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        architecture, modeling = f"FlextronElastic{declared.architecture}", f"modeling_flextron_elastic_{declared.model_type}"
        for name in ("per_layer_config", "num_attention_heads_per_layer"):
            config.pop(name, None)
        config |= {
            "architectures": [architecture],
            "model_type": f"flextron_elastic_{declared.model_type}",
            "auto_map": {
                "AutoConfig": f"{_COMMON[0]}.FlextronElastic{declared.classes}Config",
                "AutoModelForCausalLM": f"{modeling}.{architecture}",
            },
            "head_dim": info.model.kv_channels,
        }
        for name in (*_COMMON, modeling):
            shutil.copyfile(_CODE / f"{name}.py", out / f"{name}.py")
        write_family(out / FAMILY_FILE, family)
        if job.token_routers is not None:
            save_file(job.token_routers[1], out / ROUTERS_FILE, metadata={"format": "pt"})
        (out / "README.md").write_text(_card(job, architecture, family), encoding="utf-8")
        write_json(out / "config.json", config)
        found = figures(out, "hf_elastic", architecture, count_parameters(info.model))
        return found | {"selector": family["selector"], "networks": len(family["networks"])}

    return on_main_process(finished)


def networks(job: Job) -> list[SubNetwork]:
    """The full model, the smallest network, some whose layers differ on all axes, and some answers of the table."""
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
    """Logits of the directory, in transformers, which loads it once for all networks."""
    model = _loaded(job.out, (job.out / "config.json").stat().st_mtime_ns)
    model.set_subnetwork(net.to_dict())
    with torch.no_grad():
        found = model(tokens_BS).logits
    if net == networks(job)[-1]:
        _loaded.cache_clear()
    return found


@lru_cache(maxsize=1)
def _loaded(folder: Path, written: int) -> PreTrainedModel:
    """written: when, so that a directory that is written again is loaded again."""
    from transformers import AutoModelForCausalLM  # slow to import

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


FORMAT = Format(write, logits, rounding, networks)


def _card(job: Job, architecture: str, family: dict[str, Any]) -> str:
    space, adaptive = job.info.space, family["adaptive"]
    tokens = "\nmodel.set_budget(0.6, adaptive=True)   # every token chooses for itself" if adaptive else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [flextron]
---
# A Flextron model: many in one

`{architecture}`: {count_parameters(job.info.model):,} parameters in {job.dtype}, and all sub-networks of them, chosen at run time
without reloading.

| | |
|---|---|
| query heads of a layer ({space.attention_unit}) | {", ".join(map(str, space.heads))} |
| neurons of a layer | {", ".join(map(str, space.ffn_hidden_size))} |
| hidden size | {", ".join(map(str, space.hidden_size))} |
| layers | {", ".join(map(str, space.depth))} |
| budgets are of | {", ".join(family["costs"])}; a plain fraction is one of the full model's {family["fraction_of"]} |
| they are answered by | the selector `{family["selector"]}` |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
prompt = tokenizer("The", return_tensors="pt")
model.set_budget(0.6)   # or "25ms", "3.4B", "8GiB"; None: the full model{tokens}
print(model.costs(), model.subnetwork)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
print(model.generate_speculative(prompt.input_ids, draft_budget=0.6))  # a small network drafts for the one that is set
```
"""
