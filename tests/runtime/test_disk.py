"""All or nothing: what stands at a path before and after."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from flextron_mcore.runtime.disk import forget, write_aside, write_whole


@pytest.mark.parametrize("linked", [False, True])
def test_a_directory_is_replaced_when_the_new_one_is_whole(tmp_path, linked):
    place = tmp_path / "elsewhere" / "place"
    place.mkdir(parents=True)
    (place / "old").touch()
    target = tmp_path / "link" if linked else place
    if linked:
        target.symlink_to(place)
    with pytest.raises(KeyboardInterrupt), write_aside(target) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert [path.name for path in place.iterdir()] == ["old"]
    for _ in range(2):
        with write_aside(target) as folder:
            (folder / "new").touch()
        assert [path.name for path in place.iterdir()] == ["new"]
    assert target.is_symlink() is linked and [path.name for path in place.parent.iterdir()] == ["place"]


def test_a_small_file_is_replaced_at_once(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    write_whole(file, "old")
    write = Path.write_text

    def half(self, text, **options):
        write(self, text[:1], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_write_aside_leaves_nothing_or_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), write_aside(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with write_aside(target) as folder:
        (folder / "whole").write_text("1")
    with write_aside(target) as folder:
        (folder / "whole").write_text("2")
    assert (target / "whole").read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_forgetting_a_file_keeps_what_is_in_it(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.write(b"one")
        file.flush()
        forget(file.name)
        file.write(b", two")
    forget(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"one, two"
