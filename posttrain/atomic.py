"""Writes that a kill or a full disk cannot leave half done."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from posttrain.errors import PosttrainError


def make_folder(folder: Path) -> None:
    """`folder` and those above it. PosttrainError where one of them is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise PosttrainError(f"{folder} is a file, or lies below one; give the path of a folder") from error


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """What the system says of a temporary name beside `path` is told of `path`, which somebody gave."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_writable(path: str | os.PathLike) -> None:
    """PosttrainError where `atomic_write` could not write `path`: to be asked before hours of work for it."""
    folder = Path(path).absolute().parent
    try:
        if Path(path).is_dir():
            raise PosttrainError(f"{path} is a folder; give the path of a file")
        while not folder.exists():
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise PosttrainError(f"{path} cannot be written ({error.strerror}); give a file in a folder of yours") from error


def check_folder_writable(path: str | os.PathLike) -> None:
    """PosttrainError where `atomic_dir` could not write `path`: to be asked before hours of work for it."""
    try:
        folder = Path(path).resolve()
        if folder.exists() and not folder.is_dir():
            raise PosttrainError(f"{path} is a file; give a folder")
        folder = folder.parent
        while not folder.exists():
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise PosttrainError(f"{path} cannot be written ({error.strerror}); give a folder in one of yours") from error
    check_replaceable(path)


def check_replaceable(path: str | os.PathLike) -> None:
    """PosttrainError where `path` is the current folder or holds it: another folder would take its place, and whoever stands in
    the old one would be in a deleted one, where no relative path leads anywhere."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # deleted already
        return
    if here.is_relative_to(Path(path).resolve()):
        raise PosttrainError(
            f"{path} is the current folder, or holds it, and would be replaced; give another folder, or run from outside of it"
        )


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable (a no-op where folders cannot be opened, as on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it replaces `path`, on an error it is removed.

    The file's bytes reach the disk before the rename, so a reader sees the old file or the new one, never a part.
    """
    path = Path(path).resolve()  # through a link to where the bytes are to be, which may be another disk
    make_folder(path.parent)
    if path.is_dir():
        raise PosttrainError(f"{path} is a folder; give the path of a file")
    with _about(path):
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(fd)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on a clean exit it takes `path`'s place, on an error it is removed.

    A folder already at `path` changes places with it in one step where the system can (Linux); elsewhere it is moved
    aside first, put back if that fails, and deleted last: at every moment one whole copy exists. PosttrainError where
    that folder is the current one, or no folder but a file.
    """
    check_replaceable(path)
    path = Path(path).resolve()  # through a link to where the bytes are to be, which may be another disk
    make_folder(path.parent)
    if path.exists() and not path.is_dir():
        raise PosttrainError(f"{path} is a file, and a folder is to be written there; move it away, or give another path")
    with _about(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        os.chmod(temporary, 0o777 & ~_umask())
        if not path.exists():
            os.rename(temporary, path)
        elif not _exchange(temporary, path):
            aside = temporary.with_suffix(".old")
            os.rename(path, aside)
            try:
                os.rename(temporary, path)
            except OSError:
                os.rename(aside, path)
                raise
            os.rename(aside, temporary)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: str | os.PathLike, names: str) -> None:
    """Delete what a kill left half written in `folder` of what has a name that matches the regular expression `names`."""
    for path in list(Path(folder).iterdir()) if Path(folder).is_dir() else []:
        if re.fullmatch(rf"\.(?:{names})\.[^.]+\.tmp", path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, rename_exchange = -100, 2
    return renameat2 is not None and renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), rename_exchange) == 0


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
