"""posttrain/atomic.py: the old file or the new one, whatever happens in between."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap

import pytest

from posttrain.atomic import atomic_dir, atomic_write, check_writable
from posttrain.errors import PosttrainError


def _run(code: str, *args: str) -> int:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *args], stderr=subprocess.DEVNULL).returncode


def test_write_replaces(tmp_path):
    target = tmp_path / "new" / "file"
    for text in ("first", "second"):
        with atomic_write(target) as temporary:
            temporary.write_text(text)
        assert target.read_text() == text
    assert [p.name for p in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("write", [atomic_write, atomic_dir])
def test_a_file_where_a_folder_must_be(tmp_path, write):
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        with pytest.raises(PosttrainError, match="is a file, or lies below one"), write(path):
            pass
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_does_not_take_a_file_s_place(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(PosttrainError, match="file is a file, and a folder is to be written there"), atomic_dir(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("write", [atomic_write, atomic_dir])
def test_a_link_is_followed_and_stays(tmp_path, write):
    (tmp_path / "disk" / "there").mkdir(parents=True)
    target, link = tmp_path / "disk" / "there" / "x", tmp_path / "link"
    link.symlink_to(target)
    for text in ("first", "second"):
        with write(link) as temporary:
            (temporary / "file" if temporary.is_dir() else temporary).write_text(text)
        assert link.is_symlink() and not target.is_symlink()
        assert (target / "file" if target.is_dir() else target).read_text() == text
        assert list(target.parent.iterdir()) == [target] and {p.name for p in tmp_path.iterdir()} == {"disk", "link"}


def test_what_cannot_be_written_is_named_as_it_was_given(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for path, message in (
        (tmp_path / "folder", "folder is a folder; give the path of a file"),
        (tmp_path / "file" / "x" / "y", "/file/x/y cannot be written .Not a directory"),
        (tmp_path / ("n" * 300), "nn cannot be written .File name too long"),
    ):
        with pytest.raises(PosttrainError, match=message):
            check_writable(path)
        with pytest.raises((PosttrainError, OSError)) as error, atomic_write(path) as temporary:
            temporary.write_text("new")
        assert str(path.name) in str(error.value) and ".tmp" not in str(error.value)
    check_writable(tmp_path / "new" / "file")
    check_writable(tmp_path / "file")
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"} and (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("given", [".", "..", "../here", "link"])
def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch, given):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(PosttrainError, match="is the current folder, or holds it.*give another folder"), atomic_dir(given):
        pass
    with atomic_dir("below") as temporary:
        (temporary / "file").write_text("x")
    assert (tmp_path / "here" / "below" / "file").read_text() == "x"


def test_write_respects_umask(tmp_path):
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("x")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_error_keeps_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_kill_keeps_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    code = """
        import os, signal, sys
        from posttrain.atomic import atomic_write
        with atomic_write(sys.argv[1]) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert _run(code, str(target)) == -signal.SIGKILL
    assert target.read_text() == "old"


def test_full_disk_keeps_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    code = """
        import resource, signal, sys
        from posttrain.atomic import atomic_write
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails as on a full disk: OSError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            with atomic_write(sys.argv[1]) as temporary:
                temporary.write_bytes(b"x" * 5000)
        except OSError:
            sys.exit(7)
    """
    assert _run(code, str(target)) == 7
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    """Both ways in which a folder takes another's place: the second is for systems that cannot swap names."""
    if request.param == "two renames":
        monkeypatch.setattr("posttrain.atomic._exchange", lambda a, b: False)


def test_dir_replaces_whole(tmp_path, way):
    target = tmp_path / "model"
    for names in (("a", "b"), ("b", "c")):
        with atomic_dir(target) as temporary:
            for name in names:
                (temporary / name).write_text(name)
        assert sorted(p.name for p in target.iterdir()) == list(names)
    assert list(tmp_path.iterdir()) == [target]


def test_dir_is_put_back_when_it_cannot_be_replaced(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "a").write_text("old")
    rename = os.rename

    def refuse(source, destination):
        if str(source).endswith(".tmp"):
            raise OSError("refused")
        rename(source, destination)

    monkeypatch.setattr("posttrain.atomic._exchange", lambda a, b: False)
    monkeypatch.setattr("os.rename", refuse)
    with pytest.raises(OSError, match="refused"), atomic_dir(target) as temporary:
        (temporary / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_dir_error_keeps_the_old(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_dir(target) as temporary:
        (temporary / "a").write_text("new")
        raise ZeroDivisionError
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
