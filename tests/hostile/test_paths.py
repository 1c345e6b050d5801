"""Links, FIFOs, devices and directories in the place of files, and names that lead out of a directory."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flextron_mcore.checkpoint.hf import open_hf
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import open_data
from flextron_mcore.data.tokenizer import open_tokenizer
from flextron_mcore.files import check_file, child, read_json
from tests.hostile.conftest import Copy, refusal

# {place of a file in the inputs: command that reads it}
FILES: dict[str, list[str]] = {
    "hf/config.json": ["import", "hf={root}/hf"],
    "hf/model.safetensors": ["import", "hf={root}/hf"],
    "hf/tokenizer.json": ["import", "hf={root}/hf"],
    "hf/tokenizer_config.json": ["prepare", "input={root}/text.txt", "tokenizer={root}/hf"],
    "run/checkpoints/iter_0000000/flextron.json": ["select", "checkpoint={root}/run", "budget=0.9", "selector=uniform"],
    "run/checkpoints/iter_0000000/.metadata": ["evaluate", "checkpoint={root}/run", "data={root}/data"],
    "run/checkpoints/iter_0000000/metadata.json": ["evaluate", "checkpoint={root}/run", "data={root}/data"],
    "run/checkpoints/iter_0000000/common.pt": ["sensitivity", "checkpoint={root}/run", "data={root}/data"],
    "run/tokenizer/tokenizer.json": ["generate", "checkpoint={root}/run", "prompt=x", "max_new_tokens=4"],
    "run/tokenizer/tokenizer_config.json": ["export", "checkpoint={root}/run", "verify=false"],
    "data/data.json": ["pretrain", "data={root}/data"],
    "data/text_train.idx": ["elastic", "data={root}/data", "checkpoint={root}/run"],
    "data/text_valid.bin": ["evaluate", "data={root}/data", "checkpoint={root}/run"],
    "data/tokenizer/tokenizer.json": ["elastic", "data={root}/data", "checkpoint={root}/run"],
    "data/metrics.json": ["report", "run={root}"],
    "net.json": ["export", "checkpoint={root}/run", "subnetwork={root}/net.json"],
}


def fifo(file: Path) -> None:
    os.mkfifo(file)


def device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def unix_socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(file.parent)  # the path of a socket has at most 107 bytes
        try:
            made.bind(file.name)
        finally:
            os.chdir(here)


def directory(file: Path) -> None:
    file.mkdir()


def link(file: Path) -> None:
    """Replace the file by a link to a copy of it elsewhere."""
    file.symlink_to(file.parents[len(file.parents) - 4] / f"kept-{file.name}")


def command(copy: Copy, name: str) -> list[str]:
    out = [] if FILES[name][0] in ("select", "generate") else [f"out={copy.root}/out"]
    return [key.format(root=copy.root) for key in FILES[name]] + out


def replace(file: Path, kind: Callable[[Path], None], root: Path) -> None:
    shutil.move(file, root / f"kept-{file.name}")
    kind(file)


@pytest.mark.parametrize("kind", [fifo, unix_socket, directory, device])
@pytest.mark.parametrize("name", FILES)
def test_special_files(copy, name, kind):
    """FIFOs, sockets, directories and devices in the place of files are refused in one line, without waiting or reading."""
    replace(copy.root / name, kind, copy.root)
    message = refusal(*command(copy, name))
    assert Path(name).name in message or kind is directory
    assert not (copy.root / "out").exists()


@pytest.mark.parametrize("name", [name for name in FILES if name != "net.json"])
def test_links_out_of_a_directory(copy, name):
    file = copy.root / name
    kept = copy.root.parent / f"elsewhere-{file.name}"
    shutil.move(file, kept)
    file.symlink_to(kept)
    assert f"{file}: is a link out of its directory, to {kept}, which is not followed" in refusal(*command(copy, name))


def test_a_file_that_the_user_names_may_be_a_link(copy):
    (copy.root / "link.json").symlink_to(copy.root / "net.json")
    assert open_checkpoint(copy.root / "run").network(copy.root / "link.json")


def test_links_in_a_cache_of_hugging_face(copy):
    """A snapshot consists of links to blobs of the same repository; those are followed, others are not."""
    repository = copy.root / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate((copy.root / "hf").iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert open_hf(snapshot).sources and open_tokenizer(snapshot).vocab_size
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(copy.root / "hf" / "config.json")
    with pytest.raises(FlextronError, match="is a link out of its directory, to .*cp -rL"):
        open_hf(snapshot)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", "", 3, None, "a\0b"])
def test_names_in_descriptions(copy, name):
    """Files that name other files cannot name those outside of their directory."""
    with pytest.raises(FlextronError, match="which is not inside its directory: use an unchanged copy"):
        child(copy.root, name, copy.root / "index.json")


def test_descriptions_that_name_files_elsewhere(copy):
    root, words = copy.root, "which is not inside its directory: use an unchanged copy"

    def edit(file: Path, change: Callable[[dict], None]) -> None:
        values = json.loads(file.read_text())
        values.pop("digest", None)  # as an earlier version wrote it
        (file.parent / "digests.json").unlink(missing_ok=True)
        change(values)
        file.write_text(json.dumps(values))

    tensors = load_file(root / "hf" / "model.safetensors")
    shutil.move(root / "hf" / "model.safetensors", root / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "../secret.safetensors")}
    (root / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FlextronError, match=words):
        open_hf(root / "hf")
    shutil.copytree(root / "data", root / "other")
    edit(root / "data" / "data.json", lambda values: values["domains"]["text"].update(train="../other/text_train"))
    with pytest.raises(FlextronError, match=words):
        open_data(root / "data")
    shutil.copy(root / "other" / "data.json", root / "data")
    edit(root / "data" / "data.json", lambda values: values.update(tokenizer=str(root / "other" / "tokenizer")))
    with pytest.raises(FlextronError, match=words):
        open_data(root / "data")
    edit(copy.checkpoint / "flextron.json", lambda values: values["files"].update({"../../../net.json": 3}))
    with pytest.raises(FlextronError, match="flextron.json"):
        open_checkpoint(root / "run")
    (root / "rows.json").write_text(json.dumps([{"subnetwork": "../in/net.json", "ms": 1.0}]))
    assert words in refusal("latency", f"checkpoint={copy.root.parent}/good", f"measurements={root}/rows.json", f"out={root}/out")


def test_safetensors_headers_that_lie(copy):
    """Headers with lengths, offsets, shapes and dtypes that do not fit the file are refused."""
    file = copy.root / "hf" / "model.safetensors"
    good = file.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")

    def fails(**changes: object) -> None:
        text = json.dumps({**header, name: {**header[name], **changes}}).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + good[8 + length :])
        with pytest.raises(FlextronError, match="model.safetensors: .*download it again|quantized|config.json gives"):
            for tensor in open_hf(copy.root / "hf").sources.values():
                tensor.read()

    first, last = header[name]["data_offsets"]
    for offsets in ([last, first], [-8, last - first - 8], [0, 2**62], [first + 4, last + 4], [0.5, 1], [first], "ab", None):
        fails(data_offsets=offsets)
    for shape in ([2**40, 2**40], [-1, -1], [1.5], ["a"], None, [True], [10**30]):
        fails(shape=shape)
    for dtype in ("I8", "F8_E4M3", "X", None, [], {}):
        fails(dtype=dtype)
    for start in (2**63, length + 10**9, 10**8 + 1):
        file.write_bytes(start.to_bytes(8, "little") + good[8:])
        with pytest.raises(FlextronError, match="model.safetensors: "):
            open_hf(copy.root / "hf")
    for text in (b"[]", b"{}", b'{"a": 1}', b"[" * 50000, b'{"a": ' * 50000, b"\xff"):
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(FlextronError, match=f"{copy.root}/hf"):
            open_hf(copy.root / "hf")


def test_weights_that_overlap(copy):
    """A file whose two tensors have the same bytes, so that the bytes of one are missing, is refused."""
    file = copy.root / "hf" / "model.safetensors"
    names = sorted(load_file(file))
    save_file({name: torch.zeros(2, 2) for name in names[:2]}, file)
    data = file.read_bytes().replace(b"[16,32]", b"[0,16] ")
    file.write_bytes(data[:-16])
    with pytest.raises(FlextronError, match="model.safetensors: "):
        open_hf(copy.root / "hf")


def test_files_of_another_kind(tmp_path):
    assert check_file(tmp_path / "missing") is None
    with pytest.raises(FlextronError, match="is a directory, not a regular file: name or put a file there"):
        check_file(tmp_path)
    with pytest.raises(FlextronError, match="is a device, not a regular file"):
        read_json("/dev/zero", given=True)
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", 10**12)
    with pytest.raises(FlextronError, match="large.json: is larger than 64 MiB, more than such a file needs"):
        read_json(tmp_path / "large.json")
