"""The safetensors reader and writer against the safetensors package, and against damaged files."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posttrain.errors import PosttrainError
from posttrain.model.safetensors_file import DTYPES, SafetensorsReader, write_safetensors

DTYPE_LIST = list(DTYPES.values())


def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.rand(shape) * 100).to(dtype)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(DTYPE_LIST)),
        min_size=1,  # of none at all, the package writes a header that is not JSON
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
def test_the_package_reads_ours_and_we_read_its(tmp_path_factory, shapes, metadata):
    folder = tmp_path_factory.mktemp("files")
    tensors = {name: make(tuple(shape), dtype) for name, (shape, dtype) in shapes.items()}
    write_safetensors(folder / "ours", tensors.items(), metadata)
    save_file(tensors, folder / "theirs", metadata)
    back = load_file(folder / "ours")
    assert back.keys() == tensors.keys()
    with safe_open(folder / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}
    with SafetensorsReader(folder / "theirs") as reader:
        assert reader.entries.keys() == tensors.keys()
        for name, tensor in tensors.items():
            for other in (back[name], reader.read(name)):
                assert other.dtype == tensor.dtype and other.shape == tensor.shape and torch.equal(other, tensor)


def test_no_tensors_at_all(tmp_path):
    write_safetensors(tmp_path / "x", [])
    assert load_file(tmp_path / "x") == {}
    with SafetensorsReader(tmp_path / "x") as reader:
        assert reader.entries == {} and reader.metadata == {"format": "pt"}


def test_non_contiguous_tensors_are_written_by_value(tmp_path):
    x = torch.randn(6, 8)
    write_safetensors(tmp_path / "x", [("t", x.T), ("s", x[::2, 1:5]), ("e", x[:1].expand(3, 8))])
    back = load_file(tmp_path / "x")
    assert torch.equal(back["t"], x.T) and torch.equal(back["s"], x[::2, 1:5]) and torch.equal(back["e"], x[:1].expand(3, 8))


def test_what_was_read_outlives_the_file(tmp_path):
    x = torch.randn(100)
    write_safetensors(tmp_path / "x", [("x", x)])
    with SafetensorsReader(tmp_path / "x") as reader:
        y = reader.read("x")
    (tmp_path / "x").write_bytes(b"")
    assert torch.equal(x, y)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "x"
    write_safetensors(path, [("a", torch.randn(3, 4)), ("b", torch.arange(5))])
    return path.read_bytes()


@given(st.data())
def test_every_truncation_is_an_error_that_names_the_file(tmp_path_factory, whole_file, data):
    path = tmp_path_factory.mktemp("cut") / "cut.safetensors"
    path.write_bytes(whole_file[: data.draw(st.integers(0, len(whole_file) - 1))])
    with pytest.raises(PosttrainError, match=r"cut\.safetensors is not a whole safetensors file.*again"):
        SafetensorsReader(path)


def with_header(whole: bytes, header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + int.from_bytes(whole[:8], "little") :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F32", "shape": [3, 5], "data_offsets": [40, 88]}, r"tensor a of F32 \[3, 5\] does not fit"),
        ({"dtype": "F32", "shape": [3, 4], "data_offsets": [48, 96]}, "starts at byte"),
        ({"dtype": "F32", "shape": [3, 4], "data_offsets": [32, 80]}, "starts at byte"),
        ({"dtype": "F32", "shape": [-3, -4], "data_offsets": [40, 88]}, "does not fit"),
        ({"dtype": "F32", "shape": 12, "data_offsets": [40, 88]}, "malformed"),
        ({"dtype": "F32", "shape": [3, 4]}, "malformed"),
        ({"dtype": "F8_E4M3", "shape": [48], "data_offsets": [40, 88]}, "dtype F8_E4M3; expected one of"),
        ("nonsense", "malformed"),
        ({"dtype": "F32", "shape": [3, 4], "data_offsets": [40.0, 88.0]}, "malformed"),
        ({"dtype": "F32", "shape": [3, 4.0], "data_offsets": [40, 88]}, "malformed"),
        ({"dtype": "F32", "shape": [True, 12], "data_offsets": [40, 88]}, "malformed"),
        ({"dtype": "F32", "shape": [0, 10**30], "data_offsets": [40, 40]}, "malformed"),
        ({"dtype": "F32", "shape": [2**40, 0, 2**40], "data_offsets": [40, 40]}, "malformed"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, whole_file, change, message):
    length = int.from_bytes(whole_file[:8], "little")
    header = json.loads(whole_file[8 : 8 + length])
    assert header["a"]["data_offsets"] == [40, 88]  # after b's int64
    path = tmp_path / "x"
    path.write_bytes(with_header(whole_file, {**header, "a": change}))
    with pytest.raises(PosttrainError, match=message):
        SafetensorsReader(path)


@pytest.mark.parametrize(
    "header", [b"{", b"[1]", b"\xff\xfe", b"null", {}, b"[" * 100_000, {"__metadata__": [1]}, {"__metadata__": {"a": 1}}]
)
def test_a_header_that_is_none_is_refused(tmp_path, whole_file, header):
    path = tmp_path / "x"
    path.write_bytes(with_header(whole_file, header))
    with pytest.raises(PosttrainError, match="not a whole safetensors file"):
        SafetensorsReader(path)


def test_trailing_bytes_are_refused(tmp_path, whole_file):
    (tmp_path / "x").write_bytes(whole_file + b"\0")
    with pytest.raises(PosttrainError, match="header describes"):
        SafetensorsReader(tmp_path / "x")


def test_a_file_cut_while_open_is_an_error(tmp_path, whole_file):
    (tmp_path / "x").write_bytes(whole_file)
    with SafetensorsReader(tmp_path / "x") as reader:
        (tmp_path / "x").write_bytes(whole_file[:-4])
        with pytest.raises(PosttrainError, match="ends early"):
            reader.read("a")
