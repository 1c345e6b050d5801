"""llama.cpp, which runs the exported GGUF files."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

MISSING = "llama.cpp is not installed: make setup-llama-cpp"


class Engine:
    """A GGUF file loaded in llama.cpp. KV cache in fp32, and no flash attention, which computes in f16."""

    def __init__(self, file: Path, **options) -> None:
        import llama_cpp

        exact = dict(type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False)
        self.model = llama_cpp.Llama(
            str(file), **(exact | options), n_ctx=256, n_batch=256, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False
        )

    def row(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [sequence, vocabulary] of one text."""
        self.model.reset()
        self.model.eval(list(ids))
        return np.array(self.model.scores[: len(ids)])

    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Logits [batch, sequence, vocabulary], computed text by text."""
        return torch.from_numpy(np.stack([self.row(row) for row in tokens_BS.tolist()]))

    def greedy(self, prompt: Sequence[int], length: int) -> list[int]:
        """Ids of `length` tokens after `prompt`, decoded one by one with the KV cache."""
        found = [int(self.row(prompt)[-1].argmax())]
        while len(found) < length:
            self.model.eval([found[-1]])
            found.append(int(self.model.scores[self.model.n_tokens - 1].argmax()))
        return found

    def tokenize(self, text: str, add_bos: bool = False, special: bool = False) -> list[int]:
        return self.model.tokenize(text.encode(), add_bos=add_bos, special=special)


@pytest.fixture(scope="session")
def engine() -> type[Engine]:
    """Function from a GGUF file to its Engine. Skips the test without llama.cpp; with FLEXTRON_REQUIRE_LLAMA_CPP=1 it fails."""
    try:
        importlib.import_module("llama_cpp")
    except ImportError:
        if os.environ.get("FLEXTRON_REQUIRE_LLAMA_CPP") == "1":
            pytest.fail(MISSING, pytrace=False)
        pytest.skip(MISSING)
    return Engine
