"""`flextron prepare`: conversion of text to Megatron datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flextron_mcore.data.prepare import parse_inputs, prepare_data
from flextron_mcore.runs.output import check_output, serial_output, write_metrics
from flextron_mcore.runs.terminal import print_table
from flextron_mcore.runtime.ranks import is_main_process
from flextron_mcore.settings.stages import PrepareSettings


def run(settings: PrepareSettings) -> dict[str, Any]:
    """Write token files of each domain, and the tokenizer; return the content of metrics.json. Other ranks return {} at once."""
    if not is_main_process():
        return {}
    check_output(Path(settings.out), settings.overwrite)
    inputs = parse_inputs(settings.input)
    with serial_output(settings) as out:
        figures = prepare_data(
            inputs,
            out,
            tokenizer=settings.tokenizer,
            vocab_size=settings.vocab_size,
            text_key=settings.text_key,
            valid_fraction=settings.valid_fraction,
            seed=settings.seed,
            skip_bad=settings.skip_bad,
            add_bos=settings.add_bos,
            parse_special_tokens=settings.parse_special_tokens,
            progress=lambda text: print(f"prepare: {text}", flush=True),
        )
        metrics = write_metrics(out, "prepare", figures)
    rows = [[name, d["documents"], d["bytes"], d["train_tokens"], d["valid_tokens"]] for name, d in figures["domains"].items()]
    print_table("prepared data", ["domain", "documents", "bytes", "train tokens", "validation tokens"], rows)
    return metrics
