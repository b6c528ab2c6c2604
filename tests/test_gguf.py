"""posttrain.model.gguf: values against the format's definition in float64, and every way a file can be wrong."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_gguf import BLOCK, GGML, gguf_bytes, random_blocks, string

from posttrain.model.gguf import GGUF, TENSOR_TYPES, dequantize


def oracle(raw: bytes, kind: str) -> np.ndarray:
    """The block formats weight by weight in float64. Codes of 8 bits at most times float16, plus float16: exact there,
    so rounding to float32 once at the end is what the reader's float32 arithmetic must give."""
    per_block, size = BLOCK[kind]
    weights = []
    for at in range(0, len(raw), size):
        block = raw[at : at + size]
        if kind == "F32":
            weights.append(struct.unpack("<f", block)[0])
        elif kind == "F16":
            weights.append(struct.unpack("<e", block)[0])
        elif kind == "BF16":
            weights.append(struct.unpack("<f", b"\0\0" + block)[0])
        else:
            (d,) = struct.unpack("<e", block[:2])
            for j in range(per_block):
                if kind == "Q8_0":
                    weights.append(d * struct.unpack("<b", block[2 + j : 3 + j])[0])
                else:
                    byte = block[-16 + j % 16]
                    code = byte >> 4 if j >= 16 else byte & 15
                    weights.append(d * (code - 8) if kind == "Q4_0" else d * code + struct.unpack("<e", block[2:4])[0])
    return np.array(weights, np.float64).astype(np.float32)


def write(tmp_path, content: bytes):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


ENTRIES = [
    ("general.architecture", "str", "llama"),
    ("general.name", "str", "tiny ü"),
    ("a.u8", "u8", 200),
    ("a.i8", "i8", -3),
    ("a.u16", "u16", 60000),
    ("a.i16", "i16", -30000),
    ("a.u32", "u32", 2**32 - 1),
    ("a.i32", "i32", -7),
    ("a.f32", "f32", 0.5),
    ("a.bool", "bool", True),
    ("a.u64", "u64", 2**64 - 1),
    ("a.i64", "i64", -(2**63)),
    ("a.f64", "f64", 0.1),
    ("a.list", "[i32]", [1, -2, 3]),
    ("a.none", "[f32]", []),
    ("a.flags", "[bool]", [True, False]),
    ("a.words", "[str]", ["", "ein", "größer"]),
]


def small_file(alignment: int = 32) -> bytes:
    rng = np.random.default_rng(0)
    entries = ENTRIES + ([] if alignment == 32 else [("general.alignment", "u32", alignment)])
    shapes = {"F32": (3,), "F16": (2, 5), "BF16": (7,), "Q4_0": (3, 32), "Q4_1": (2, 3, 64), "Q8_0": (1, 96)}
    return gguf_bytes(
        entries, [(f"t.{kind}", shape, kind, random_blocks(rng, shape, kind)) for kind, shape in shapes.items()], alignment
    )


@pytest.mark.parametrize("alignment", [32, 8, 256])
def test_reads_metadata_and_tensors(tmp_path, alignment):
    with GGUF(write(tmp_path, small_file(alignment))) as gguf:
        assert {key: value for key, _, value in ENTRIES}.items() <= gguf.metadata.items()
        assert type(gguf.metadata["a.bool"]) is bool and type(gguf.metadata["a.flags"][0]) is bool
        assert [t.type for t in gguf.tensors.values()] == ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"]
        rng = np.random.default_rng(0)
        for name, values in gguf:
            tensor = gguf.tensors[name]
            assert values.dtype == np.float32 and values.shape == tensor.shape
            expected = oracle(random_blocks(rng, tensor.shape, tensor.type), tensor.type)
            assert np.array_equal(values.reshape(-1), expected)
    assert values.sum() == expected.sum(dtype=np.float32)  # a copy: still there after the file is closed


def test_q4_1_by_hand():
    # d = 0.5, m = -1, byte 0 = 0xF2: weight 0 has code 2, weight 16 code 15.
    block = struct.pack("<ee", 0.5, -1.0) + b"\xf2" + bytes(15)
    weights = dequantize(np.frombuffer(block, np.uint8), "Q4_1")
    assert weights[0] == 0.0 and weights[16] == 6.5 and weights[1] == weights[31] == -1.0


@given(st.sampled_from(sorted(GGML)), st.data())
@settings(max_examples=200)
def test_any_bytes_dequantize_as_defined(kind, data):
    size = BLOCK[kind][1]
    raw = data.draw(st.binary(min_size=size, max_size=6 * size).map(lambda b: b[: len(b) // size * size]))
    assert np.array_equal(dequantize(np.frombuffer(raw, np.uint8), kind), oracle(raw, kind), equal_nan=True)


@pytest.mark.peers
@pytest.mark.parametrize("kind", sorted(GGML))
def test_equals_the_gguf_package(kind):
    gguf = pytest.importorskip("gguf")
    raw = np.frombuffer(random_blocks(np.random.default_rng(1), (64, 96), kind), np.uint8)
    theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType(GGML[kind]))
    assert np.array_equal(dequantize(raw, kind), theirs.reshape(-1).astype(np.float32))


def test_every_truncation_is_an_error(tmp_path):
    whole = small_file()
    for length in range(len(whole)):
        with pytest.raises(ValueError, match="model.gguf"):
            GGUF(write(tmp_path, whole[:length]))


@given(st.data())
@settings(max_examples=300)
def test_corruption_is_read_or_refused(tmp_path_factory, data):
    """Whatever the bytes: a ValueError, or a file whose every tensor can be read. Never another exception."""
    content = bytearray(small_file())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.getbasetemp(), bytes(content))
    try:
        gguf = GGUF(path)
    except ValueError:
        return
    with gguf:
        for name, values in gguf:
            assert values.shape == gguf.tensors[name].shape


F32 = ("t", (4,), "F32", bytes(16))
HUGE = struct.pack("<Q", 2**63)


FAULTS = [
    (b"", "too short"),
    (b"PK\3\4" + bytes(60), "magic is b'PK"),
    (gguf_bytes([], [], version=1), "version is 1"),
    (gguf_bytes([], [], version=9), "version is 9"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    (b"GGUF\3\0\0\0" + HUGE + bytes(8), "number of tensors is 9223372036854775808"),
    (b"GGUF\3\0\0\0" + bytes(8) + HUGE, "number of metadata entries is 9223372036854775808"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + HUGE + bytes(64), "key of metadata entry 0 needs 9223372036854775808"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<I", 77) + bytes(64), "'k' has unknown type 77"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<II", 9, 9) + bytes(64), "element type 9"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<II", 9, 8) + HUGE, "length of 'k'"),
    (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2) + b"\xff\xfe" + bytes(64), "not UTF-8"),
    (gguf_bytes([("k", "u8", 1), ("k", "u8", 2)], []), "'k' appears twice"),
    (gguf_bytes([("general.alignment", "u32", 0)], [F32]), "general.alignment is 0"),
    (gguf_bytes([("general.alignment", "u32", 24)], [F32]), "general.alignment is 24"),
    (gguf_bytes([], [F32, F32]), "'t' appears twice"),
    (gguf_bytes([], [("t", (32,), 12, bytes(64))]), "ggml type 12.*Q4_1"),
    (gguf_bytes([], [("t", (2, 33), "Q4_1", bytes(64))]), "multiple of 32"),
    (gguf_bytes([], [("t", (0,), "F32", b"")]), r"shape \(0,\)"),
    (gguf_bytes([], [("t", (1,) * 5, "F32", bytes(4))]), "5 dimensions"),
    (gguf_bytes([], [("t", (2**40, 2**40), "F32", bytes(4))]), "truncated"),
    (
        gguf_bytes([], [("a", (1,), "F32", bytes(4)), ("b", (1,), "F32", bytes(4))], alignment=4) + bytes(64),
        "'b' starts at 4, not a multiple of the alignment 32",
    ),
    (gguf_bytes([], [("a", (16,), "F32", bytes(4)), ("b", (8,), "F32", bytes(32))]), "overlaps"),
]


@pytest.mark.parametrize("content, message", FAULTS, ids=[message for _, message in FAULTS])
def test_each_fault_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        GGUF(write(tmp_path, content))


def test_missing_file_and_tensor(tmp_path):
    with pytest.raises(FileNotFoundError):
        GGUF(tmp_path / "none.gguf")
    with GGUF(write(tmp_path, small_file())) as gguf, pytest.raises(KeyError, match="no tensor 'x'"):
        gguf.read("x")


def test_unknown_type_name():
    with pytest.raises(ValueError, match="unknown tensor type 'Q2_K'"):
        dequantize(np.zeros(0, np.uint8), "Q2_K")


def test_table_matches_the_writer():
    assert {name: number for number, (name, _, _) in TENSOR_TYPES.items()} == GGML
    assert {name: (weights, size) for name, weights, size in TENSOR_TYPES.values()} == BLOCK
    assert all(math.log2(weights) % 5 == 0 for _, weights, _ in TENSOR_TYPES.values())  # 1 or 32
