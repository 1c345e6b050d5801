"""Digests: sealed JSON, files hashed while they are written, descriptions of directories."""

from __future__ import annotations

import json
import os

import pytest
import xxhash

from flextron_mcore import digests
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.space import SubNetwork


def reference(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()


def test_every_flip_of_a_sealed_file_is_refused_or_changes_nothing(tmp_path):
    model = ModelConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, vocab_size=67, max_position_embeddings=24, ffn_hidden_size=48
    )
    net = SubNetwork.full(model)
    file = tmp_path / "net.json"
    text = net.to_json().encode()
    file.write_bytes(text)
    assert SubNetwork.from_file(file) == net
    refused = 0
    for bit in range(len(text) * 8):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            assert SubNetwork.from_file(file) == net, flipped
        except FlextronError as error:
            refused += str(file) in str(error)
    assert refused > 0.9 * len(text) * 8
    # a file that the user added has no digest
    file.write_text(json.dumps({**net.to_dict(), "hidden_size": 16}))
    assert SubNetwork.from_file(file).hidden_size == 16


def test_a_file_is_hashed_as_it_is_written(tmp_path):
    """Pieces of a file may have any size and order. If they leave a gap or overlap, the file is read back to be hashed."""
    large = os.urandom(3 << 20)
    for name, pieces in {
        "in order": [(0, b"abc"), (3, large), (3 + len(large), b"z")],
        "parts": [(0, b"head"), (4 + len(large), b"tail"), (4, large)],
        "overlap": [(0, b"abcdef"), (2, b"xy")],
        "gap": [(0, b"ab"), (7, b"cd")],
        "empty": [],
    }.items():
        file = tmp_path / name
        with digests.HashingFile(file) as stream:
            for place, data in pieces:
                stream.seek(place)
                stream.write(data)
        entry, data = digests.entry_of(file), file.read_bytes()
        assert entry["bytes"] == len(data), name
        if name == "parts":
            middle = {"0": reference(b"head"), "4": reference(large), str(4 + len(large)): reference(b"tail")}
            assert entry["xxh128"] == middle
        else:
            assert entry["xxh128"] == reference(data), name
        assert digests.damage(file, entry) is None
        for place in {0, len(data) // 2, len(data) - 1} if data else ():
            flipped = bytearray(data)
            flipped[place] ^= 16
            file.write_bytes(flipped)
            assert digests.damage(file, entry) == f"{file} is damaged: its bytes changed since it was written", (name, place)


def test_a_remembered_digest_is_that_of_the_same_file_only(tmp_path):
    file = tmp_path / "file"
    with digests.HashingFile(file) as stream:
        stream.write(b"first")
    other = tmp_path / "renamed"
    file.rename(other)
    assert digests.entry_of(other)["xxh128"] == reference(b"first")
    os.utime(other, ns=(1, 1))
    other.write_bytes(b"other")
    assert digests.entry_of(other)["xxh128"] == reference(b"other")


def test_a_description_lists_what_lies_in_a_directory(tmp_path):
    for name in ("a", "inner/b", ".metadata", ".out.lock", "tensorboard/events", "cache/index", "stage/config.yaml", "stage/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    digests.write_digests(tmp_path, upcoming={"later": "text", "inner/a": ""})
    (tmp_path / "inner" / "a").touch()
    file = tmp_path / digests.DIGESTS_FILE
    assert list(digests.files_of(digests.read_description(file), file)) == [".metadata", "a", "inner/a", "inner/b", "later"]
    with pytest.raises(FlextronError, match="later is missing: bring it back from a copy, or take it as it is"):
        digests.check_files(tmp_path)
    (tmp_path / "later").write_text("text")
    assert digests.check_files(tmp_path)
    (tmp_path / "inner" / "b").write_text("inner/c")
    assert digests.check_files(tmp_path, "a", "later")
    for names in ((), ("inner",), ("inner/b",)):
        with pytest.raises(FlextronError, match="inner/b is damaged: its bytes changed since it was written"):
            digests.check_files(tmp_path, *names)
    assert not digests.check_files(tmp_path / "inner")


@pytest.mark.parametrize(
    "files", [[1], {"../a": {"bytes": 1, "xxh128": ""}}, {"/a": {"bytes": 1}}, {"a": "x"}, {"a": {"xxh128": "x"}}, {"": 1}]
)
def test_a_description_of_another_form_is_refused(tmp_path, files):
    file = tmp_path / digests.DIGESTS_FILE
    file.write_text(json.dumps(digests.seal({"files": files})))
    with pytest.raises(FlextronError, match=r"digests.json: is damaged \(its list of files\)"):
        digests.check_files(tmp_path)


def test_a_description_that_lost_its_own_digest_is_refused(tmp_path):
    (tmp_path / "a").write_text("a")
    digests.write_digests(tmp_path)
    file = tmp_path / digests.DIGESTS_FILE
    file.write_text(file.read_text().replace('"digest"', '"digesT"'))
    with pytest.raises(FlextronError, match="digests.json: changed since it was written"):
        digests.check_files(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "[" * 100_000, b"\xff"])
def test_a_damaged_description_is_named(tmp_path, text):
    file = tmp_path / digests.DIGESTS_FILE
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FlextronError, match=r"digests.json: is damaged \("):
        digests.check_files(tmp_path)
