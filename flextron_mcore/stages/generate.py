"""`flextron generate`: text from a sub-network, or with token-by-token routing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flextron_mcore.adaptive.serving import routers_at_budget
from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.choosing import Network
from flextron_mcore.config import FlextronError
from flextron_mcore.data.tokenizer import Tokenizer, open_tokenizer
from flextron_mcore.evaluation.generation import Sampling, generate
from flextron_mcore.files import explain, read_text
from flextron_mcore.model import check_layout, loaded_model
from flextron_mcore.runs.choice import chosen_network
from flextron_mcore.runs.memory import generation_line
from flextron_mcore.runs.opened import precision
from flextron_mcore.runs.output import check_file, write_file
from flextron_mcore.runs.terminal import progress_bar, say, say_next, warn
from flextron_mcore.runs.tokenizers import end_tokens, other_rules
from flextron_mcore.runtime.distributed import device
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.settings.stages import GenerateSettings


def run(settings: GenerateSettings) -> dict[str, Any]:
    """Continue prompts with the network of settings.subnetwork or settings.budget, or with the full model.

    Call on all ranks. Returns {"stage", "texts": [{"prompt", "continued"}], "tokens": number of generated ones, "prompt_ms",
    "ms_per_token" (None for a single token), "device"} and, as far as known, "subnetwork", "cost" and "share" of the full model's
    cost. It is also written to settings.out, if given.
    """
    layout = settings.model
    if layout.sequence_parallel:
        raise FlextronError("generate: a single token cannot be split over ranks: set model.sequence_parallel=false")
    out = Path(settings.out) if settings.out else None
    check_file(out, settings.overwrite)
    info = open_checkpoint(settings.checkpoint)
    computed = precision(settings, info)
    check_layout(info.model, info.space, layout, computed)
    folder = settings.tokenizer or info.tokenizer
    if folder is None:
        raise FlextronError(
            f"checkpoint={info.path}: has no tokenizer beside it: set tokenizer= to the directory of a Hugging Face tokenizer"
        )
    tokenizer = open_tokenizer(folder, settings.add_bos, settings.parse_special_tokens)
    ends = end_tokens(Path(folder), info, tokenizer.eod)
    if rules := other_rules(Path(folder)):
        named = ", ".join(f"{key} = {value}"[:60] for key, value in rules.items())
        warn(f"{folder}/generation_config.json: not applied, so that transformers may write another text: {named}")
    texts = _prompts(settings)
    prompts = tokenizer.encode_prompts(texts)
    _check_rows(prompts, tokenizer, info.model.vocab_size)
    longest = max(map(len, prompts)) + settings.max_new_tokens
    if longest > info.model.max_position_embeddings:
        raise FlextronError(
            f"max_new_tokens={settings.max_new_tokens}: with a prompt of {longest - settings.max_new_tokens} tokens that is more "
            f"than the model's {info.model.max_position_embeddings} positions: lower max_new_tokens, or shorten the prompt"
        )
    network, spent = _network(settings, info)
    say(generation_line(settings, info, computed, [*map(len, prompts)]))
    (model,) = loaded_model(replace(layout, virtual_pipeline_model_parallel_size=None), info, computed)
    sampling = Sampling(settings.temperature, settings.top_k, settings.seed)
    with progress_bar(total=longest - min(map(len, prompts)), desc="generate", unit="token", leave=False) as bar:
        found = generate(model, prompts, network, settings.max_new_tokens, ends, sampling, bar.update)
    continued = [tokenizer.continuation(prompt, ids) for prompt, ids in zip(prompts, found.ids, strict=True)]
    count = sum(map(len, found.ids))
    steps = max(map(len, found.ids)) - 1
    figures: dict[str, Any] = {
        "stage": "generate",
        "texts": [{"prompt": prompt, "continued": text} for prompt, text in zip(texts, continued, strict=True)],
        "tokens": count,
        "prompt_ms": 1000 * found.prompt_seconds,
        "ms_per_token": 1000 * found.decode_seconds / steps if steps else None,
        "device": str(device()),
        **spent(),
    }
    for prompt, text in zip(texts, continued, strict=True):
        say(prompt + text)
    speed = f", {figures['ms_per_token']:.3g} ms a token after the first" if steps else ""
    cost = f"; {figures['share']:.3f} of the full model's {figures['cost']}" if "share" in figures else ""
    say(f"generate: {count} tokens, prompts in {figures['prompt_ms']:.3g} ms{speed}{cost}")
    write_file(out, json.dumps(figures, indent=1) + "\n")
    if settings.selector != "adaptive":  # token routing has no sub-network to export
        chosen = {key: getattr(settings, key) for key in ("subnetwork", "budget", "latency", "sensitivity")}
        chosen["selector"] = settings.selector if settings.budget is not None else None
        say_next("export", checkpoint=settings.checkpoint, **chosen, out="exported")
    return figures


def _prompts(settings: GenerateSettings) -> list[str]:
    """Prompts: the texts of settings.prompt, or the lines of settings.prompts that are not empty."""
    if (settings.prompt is None) == (settings.prompts is None):
        raise FlextronError("generate: give one of prompt=, a text or a list of them, and prompts=, a file with one a line")
    if settings.prompt is not None:
        found = settings.prompt
    else:
        try:
            lines = on_main_process(lambda: read_text(settings.prompts, given=True).splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise FlextronError(
                f"prompts={settings.prompts}: cannot be read as text: {explain(error)}: name a text file"
            ) from None
        found = [line for line in lines if line.strip()]
    if not found:
        raise FlextronError("generate: there is no prompt: give at least one in prompt= or prompts=")
    return found


def _check_rows(prompts: list[list[int]], tokenizer: Tokenizer, rows: int) -> None:
    """Raise FlextronError for a token of a prompt that has no row in the model's embedding, which has `rows` rows."""
    unknown = [i for ids in prompts for i in ids if i >= rows]
    if unknown:
        token = tokenizer.hf.convert_ids_to_tokens(unknown[0])
        raise FlextronError(
            f"prompt: has the token {token[:40]!r} with id {unknown[0]}, and the model only rows 0 to {rows - 1}: leave the "
            "token out, or import the model again with `flextron import resize_vocabulary=true ...`"
        )


def _network(settings: GenerateSettings, info: CheckpointInfo) -> tuple[Network, Callable[[], dict[str, Any]]]:
    """Network (None: full model) or token routing to compute with, and a function to call after the generation.

    The function returns {"cost": name, "share": spent share of the full model's cost} if the settings have a budget, and
    {"subnetwork": sizes} for a sub-network from a budget or a file; {} if they name neither.
    """
    if settings.selector == "adaptive":
        chosen = routers_at_budget(settings, info)
        routing = chosen.routing()

        def spent() -> dict[str, Any]:
            counts_NK = routing.counts_NK.cpu().numpy()
            return {"cost": chosen.budget.cost.name, "share": chosen.share(counts_NK / counts_NK.sum(-1, keepdims=True))}

        return routing, spent
    if settings.budget is None and settings.subnetwork is None:
        return None, dict
    chosen = chosen_network(settings, info)
    spent_by: dict[str, Any] = {"subnetwork": chosen.network.to_dict()}
    if chosen.budgets:
        cost = chosen.budgets[0].cost
        spent_by = {"cost": cost.name, "share": cost.of(chosen.network) / cost.full, **spent_by}
    return chosen.network, lambda: spent_by
