"""lm-evaluation-harness over an elastic model: its interface LM, computed on all ranks of any parallel layout.

Rank 0 runs the harness; all ranks compute what it asks for. Texts become tokens, and contexts are cut, as in lm_eval's model
`hf`. Imports lm_eval, an optional package that takes seconds: import this module only where tasks are evaluated.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from megatron.core import parallel_state

from flextron_mcore.choosing import Network
from flextron_mcore.config import FlextronError
from flextron_mcore.data.tokenizer import Tokenizer
from flextron_mcore.evaluation.generation import generate
from flextron_mcore.evaluation.tasks import LoadedTasks
from flextron_mcore.pipeline.scores import Continuation, Score, score
from flextron_mcore.runtime.ranks import drive
from flextron_mcore.runtime.unwrap import unwrap

Measured = dict[str, dict[str, Any]]  # {task: {metric: {"value": ..., "stderr": ... or None}}}
_GENERATED = 256  # tokens, where a task sets no number; as in lm_eval's model `hf`


@dataclass(frozen=True)
class Prompts:
    """Prompts to continue with the likeliest tokens.

    Attributes:
        prompts: token ids, at least one each.
        most: largest number of tokens to add to each.
        until: texts that end a continuation.
    """

    prompts: list[list[int]]
    most: int
    until: list[str]


@dataclass
class Harness:
    """Evaluates networks of a model on tasks.

    Attributes:
        chunks: this rank's virtual-pipeline chunks of the model.
        tokenizer: tokenizer of the model.
        max_length: positions of the model; longer contexts are cut on the left.
        ends: token ids that end a generated text.
        tasks: tasks, on rank 0; None on other ranks.
        micro_batch_size: sequences of a forward pass.
        limit: number of questions of each task; None for all.
        chat: True formats questions with the tokenizer's chat template.
        progress: called with a number of requests that are done.
    """

    chunks: Sequence[torch.nn.Module]
    tokenizer: Tokenizer
    max_length: int
    ends: Collection[int]
    tasks: LoadedTasks | None
    micro_batch_size: int
    limit: int | None = None
    chat: bool = False
    progress: Callable[[int], object] = lambda count: None

    def scores(self, network: Network) -> Measured:
        """Metrics of every task with their standard errors, for a sub-network, token routing or (None) the full model.

        Call on all ranks, for the same network; all get the same result. Members of groups have entries of their own. Raises
        FlextronError for a continuation or an answer that is longer than the model's positions.
        """
        return drive(self._evaluate, lambda question: self._serve(question, network))

    def _evaluate(self, ask: Callable[[Any], Any]) -> Measured:
        """Run lm_eval on rank 0. `ask` sends a list of `Continuation`, or `Prompts`, to all ranks and returns the answer."""
        os.environ["DISABLE_MULTIPROC"] = "1"  # lm_eval's helper processes would inherit our signal handlers
        random.seed(0)  # seeds of lm_eval.simple_evaluate
        np.random.seed(1234)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # bars, one for each task
            found = evaluate(
                ElasticLM(ask, self.tokenizer, self.max_length),
                self.tasks.loaded,
                limit=self.limit,
                log_samples=False,
                apply_chat_template=self.chat,
                fewshot_as_multiturn=True,
                confirm_run_unsafe_code=True,  # load_tasks refuses such tasks without the user's consent
            )
        return {name: metrics_of(row) for name, row in {**found["results"], **found.get("groups", {})}.items()}

    def _serve(self, question: Any, network: Network) -> Any:
        """Answer of all ranks to a question of `_evaluate`: token ids for `Prompts`, scores for a list of `Continuation`."""
        if isinstance(question, Prompts):
            return self._continued(question, network)
        return score(self.chunks, network, question, self.micro_batch_size, self.progress)

    def _continued(self, question: Prompts, network: Network) -> list[list[int]]:
        """Token ids that greedy decoding adds to each prompt, the same on all ranks. Data-parallel ranks share the prompts."""
        gpt = unwrap(self.chunks[0])

        def finished(ids: Sequence[int]) -> bool:
            text = self.tokenizer.hf.decode(ids, skip_special_tokens=True)
            return any(end in text for end in question.until)

        if gpt.config.pipeline_model_parallel_size > 1 or gpt.config.sequence_parallel:
            return self._continued_without_cache(question, network, finished)
        order = sorted(range(len(question.prompts)), key=lambda i: -len(question.prompts[i]))
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        mine = order[rank::ranks]
        found: dict[int, list[int]] = {}
        for start in range(0, len(mine), self.micro_batch_size):
            part = mine[start : start + self.micro_batch_size]
            prompts = [question.prompts[i] for i in part]
            written = generate(self.chunks[0], prompts, network, question.most, self.ends, finished=finished)
            found |= dict(zip(part, written.ids, strict=True))
            self.progress(len(part) * ranks)
        if ranks > 1:
            parts: list[dict[int, list[int]]] = [{}] * ranks
            torch.distributed.all_gather_object(parts, found, group=parallel_state.get_data_parallel_group())
            found = {i: ids for part in parts for i, ids in part.items()}
        return [found[i] for i in range(len(question.prompts))]

    def _continued_without_cache(
        self, question: Prompts, network: Network, finished: Callable[[Sequence[int]], bool]
    ) -> list[list[int]]:
        """Token ids that greedy decoding adds to each prompt, with a whole forward pass for each token.

        For pipeline and sequence parallelism, in which there is no KV cache.

        Args:
            question: prompts, and where their continuations end.
            network: network that decodes.
            finished: function that says if a continuation so far has one of the texts that end it.
        """
        written: list[list[int]] = [[] for _ in question.prompts]
        going = list(range(len(written)))
        for _ in range(question.most):
            if not going:
                break
            asked = [Continuation((*question.prompts[i], *written[i]), (0,)) for i in going]
            for i, found in zip(going, score(self.chunks, network, asked, self.micro_batch_size), strict=True):
                written[i].append(found.likeliest)
            going = [i for i in going if written[i][-1] not in self.ends and not finished(written[i])]
        self.progress(len(written))
        return written


class ElasticLM(TemplateLM):
    """lm_eval's interface to a model that `ask` computes.

    Args:
        ask: function that returns [Score] for a list of `Continuation`, and lists of token ids for `Prompts`.
        tokenizer: tokenizer of the model.
        max_length: positions of the model.
    """

    def __init__(self, ask: Callable[[Any], Any], tokenizer: Tokenizer, max_length: int) -> None:
        super().__init__()
        self.ask, self.tokenizer, self.max_length = ask, tokenizer.hf, max_length

    @property
    def eot_token_id(self) -> int:
        """Token id that ends a document."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token id in front of a text without context: BOS, or EOS for a tokenizer without BOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm_eval's records."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation in the tokenizer's chat template, with the start of an answer or a last message that goes on."""
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds, unless the text begins with BOS."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability, True if greedy decoding writes it) of each pair (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise FlextronError(
                    f"tasks: a continuation has {len(continuation)} tokens, which the model's {self.max_length} positions do not "
                    "hold: leave out tasks with long answers"
                )
            whole = (*context, *continuation)[-(self.max_length + 1) :]
            asked.append(Continuation(whole[:-1], tuple(continuation)))
        found: list[Score] = self.ask(asked)
        return [(each.log_probability, each.greedy) for each in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each whole text, in windows of the model's positions."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_probability, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_probability
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuation of each context, up to the first of its texts `until`."""
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        for i, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], _GENERATED)
            until = handle_stop_sequences(list(options["until"]), eos)
            groups.setdefault((options["max_gen_toks"], tuple(until)), []).append(i)
        texts = [""] * len(requests)
        for (most, until), members in groups.items():
            if most >= self.max_length:
                raise FlextronError(
                    f"tasks: {requests[members[0]].task_name} writes up to {most} tokens, which the model's {self.max_length} "
                    "positions do not hold: leave it out"
                )
            prompts = [self._prompt(requests[i].args[0], self.max_length - most) for i in members]
            for i, ids in zip(members, self.ask(Prompts(prompts, most, [*until])), strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                texts[i] = postprocess_generated_text(text, list(until), None)
        return texts

    def _prompt(self, text: str, most: int) -> list[int]:
        """Last `most` token ids of a prompt; at least one."""
        special = not has_bos_prefix(text, self.tokenizer.bos_token)
        return self.tokenizer.encode(text, add_special_tokens=special)[-most:] or [self.prefix_token_id]


def metrics_of(row: dict[str, Any]) -> dict[str, Any]:
    """{metric: {"value", "stderr"}} of lm_eval's row {"acc,none": ..., "acc_stderr,none": ...} of a task."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        metric, _, name = key.partition(",")
        if not name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{name}")
        label = metric if name == "none" else f"{metric} ({name})"
        found[label] = {"value": float(value), "stderr": float(error) if isinstance(error, int | float) else None}
    return found
