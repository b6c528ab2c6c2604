"""QuantizedWeight: what it refuses, and the exchange with bitsandbytes in both directions."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from four_bit import DTYPES, assert_same
from hypothesis import given
from hypothesis import strategies as st

from posttrain.kernels import DoubleQuantized, QuantizedWeight, codebooks, quantize_weight, quantized_linear

QUANT_TYPES = ("nf4", "fp4")
KEYS = {"weight", "weight.absmax", "weight.quant_map"}
NESTED_KEYS = {"weight.nested_absmax", "weight.nested_quant_map"}


def _state(w: QuantizedWeight) -> dict:
    return json.loads(bytes(w.to_bitsandbytes()[f"weight.quant_state.bitsandbytes__{w.quant_type}"].tolist()))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("double_quant", (True, False))
def test_layout(quant_type, double_quant):
    w = quantize_weight(torch.randn(256, 512).bfloat16(), quant_type, double_quant=double_quant)
    tensors = w.to_bitsandbytes("layer.")
    expected = KEYS | {f"weight.quant_state.bitsandbytes__{quant_type}"} | (NESTED_KEYS if double_quant else set())
    assert set(tensors) == {f"layer.{key}" for key in expected}  # its loader refuses any other key
    assert tensors["layer.weight"].shape == (65536, 1) and tensors["layer.weight"].dtype == torch.uint8
    assert tensors["layer.weight.absmax"].dtype == (torch.uint8 if double_quant else torch.float32)
    assert tensors["layer.weight.absmax"].shape == (2048,)
    state = _state(w)
    assert state["shape"] == [256, 512] and state["blocksize"] == 64 and state["dtype"] == "bfloat16"
    if double_quant:
        assert type(state["nested_offset"]) is float and state["nested_offset"] == w.absmax.offset.item()
        assert state["nested_blocksize"] == 256 and state["nested_dtype"] == "float32"
        assert tensors["layer.weight.nested_absmax"].shape == (8,)


@given(
    shape=st.sampled_from([(1, 1), (3, 5), (65,), (4, 64), (2, 3, 40), (0, 4)]), dtype=st.sampled_from(DTYPES),
    quant_type=st.sampled_from(QUANT_TYPES), block_size=st.sampled_from((32, 64, 4096)), double_quant=st.booleans(),
    prefix=st.sampled_from(("", "layer.", "model.layers.0.")),
)  # fmt: skip
def test_round_trip(shape, dtype, quant_type, block_size, double_quant, prefix):
    w = quantize_weight(torch.randn(shape).to(dtype), quant_type, block_size, double_quant)
    others = {"weight.bias": torch.ones(1), "model.layers.1.weight.absmax": torch.ones(1)}
    back = QuantizedWeight.from_bitsandbytes(w.to_bitsandbytes(prefix) | others, prefix)
    assert (back.shape, back.dtype, back.block_size, back.quant_type) == (shape, dtype, block_size, quant_type)
    for ours, theirs in zip(w.tensors(), back.tensors(), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert_same(back.dequantize(), w.dequantize())


@pytest.mark.parametrize("storage", (torch.bfloat16, torch.float16, torch.float32))
def test_packed_bytes_may_be_stored_as_floats(storage):
    """bitsandbytes' quant_storage, which FSDP needs: the same bytes under another dtype."""
    w = quantize_weight(torch.randn(16, 64))
    tensors = w.to_bitsandbytes()
    tensors["weight"] = tensors["weight"].view(-1).view(storage).view(-1, 1)
    assert torch.equal(QuantizedWeight.from_bitsandbytes(tensors).packed, w.packed)


def _broken(change: dict, drop: str | None = None):
    tensors = quantize_weight(torch.randn(8, 64)).to_bitsandbytes() | change
    tensors.pop(drop, None)
    return lambda: QuantizedWeight.from_bitsandbytes(tensors)


def _json(**change) -> dict:
    state = _state(quantize_weight(torch.randn(8, 64))) | change
    text = json.dumps({key: value for key, value in state.items() if value is not None}).encode()
    return {"weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (KeyError, "weight.absmax is missing", _broken({}, "weight.absmax")),
        (KeyError, "weight.nested_absmax is missing", _broken({}, "weight.nested_absmax")),
        (KeyError, "weight is missing", _broken({}, "weight")),
        (KeyError, "has 0 keys", _broken({}, "weight.quant_state.bitsandbytes__nf4")),
        (KeyError, "has 2 keys", _broken({"weight.quant_state.bitsandbytes__fp4": torch.ones(1)})),
        (ValueError, "is malformed", _broken({"weight.quant_state.bitsandbytes__nf4": torch.ones(3, dtype=torch.uint8)})),
        (ValueError, "is malformed", _broken(_json(dtype="int8"))),
        (ValueError, "is malformed", _broken(_json(nested_offset=None))),
        (ValueError, "is malformed", _broken(_json(shape=None))),
        (ValueError, "nested_offset is nan", _broken(_json(nested_offset=float("nan")))),
        (ValueError, "nested block size is 0", _broken(_json(nested_blocksize=0))),
        (ValueError, "no dimension can be negative", _broken(_json(shape=[-8, -64]))),
        (ValueError, r"quant_type '\[\]'", _broken(_json(quant_type=[]))),
        (ValueError, "quant_type 'int4'", _broken(_json(quant_type="int4"))),
        (ValueError, "needs 264 values of packed; given 256", _broken(_json(shape=[8, 66]))),
        (ValueError, "block_size is 48", _broken(_json(blocksize=48))),
        (ValueError, "absmax codes; given 8", _broken(_json(blocksize=32))),
        (ValueError, "quant_map holds other code values", _broken({"weight.quant_map": codebooks.FP4})),
        (ValueError, "nested_quant_map holds other", _broken({"weight.nested_quant_map": torch.zeros(256)})),
        (ValueError, "absmax codes is torch.float32", _broken({"weight.absmax": torch.ones(8)})),
    ],
)
def test_broken_state_dicts(error, match, call):
    with pytest.raises(error, match=match):
        call()


def _nested(nested_blocks: int = 1, offset_dtype: torch.dtype = torch.float32) -> dict:
    codes = torch.zeros(8, dtype=torch.uint8)
    return {"absmax": DoubleQuantized(codes, torch.zeros(nested_blocks), torch.zeros((), dtype=offset_dtype))}


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "quant_type is 'int4'", {"quant_type": "int4"}),
        (ValueError, "block_size is 100", {"block_size": 100}),
        (TypeError, "dtype is torch.float64", {"dtype": torch.float64}),
        (TypeError, "packed is torch.int8", {"packed": torch.zeros(256, dtype=torch.int8)}),
        (ValueError, "needs 256 values of packed; given 255", {"packed": torch.zeros(255, dtype=torch.uint8)}),
        (ValueError, "needs 8 values of absmax; given 9", {"absmax": torch.zeros(9)}),
        (ValueError, "absmax is on meta and packed on cpu", {"absmax": torch.zeros(8, device="meta")}),
        (TypeError, "nested offset is torch.float64", _nested(offset_dtype=torch.double)),
        (ValueError, "1 values of nested absmax; given 2", _nested(nested_blocks=2)),
    ],
)  # fmt: skip
def test_parts_must_fit(error, match, change):
    with pytest.raises(error, match=match):
        dataclasses.replace(quantize_weight(torch.randn(8, 64), double_quant=False), **change)


@pytest.mark.parametrize("double_quant", [False, True])
def test_strided_parts_are_read_as_they_are(double_quant):
    whole = quantize_weight(torch.randn(512, 128), double_quant=double_quant)

    def strided(part):
        return torch.stack([part, part.flip(0)], 1)[:, 0]

    absmax = (
        strided(whole.absmax)
        if not double_quant
        else whole.absmax._replace(codes=strided(whole.absmax.codes), absmax=strided(whole.absmax.absmax))
    )
    other = dataclasses.replace(whole, packed=strided(whole.packed), absmax=absmax)
    assert torch.equal(other.dequantize(), whole.dequantize())
    for rows in (1, 3, 100):
        x = torch.randn(rows, 128)
        assert torch.equal(quantized_linear(x, other), quantized_linear(x, whole))


def test_no_weight_is_dequantized_to_another_dtype():
    with pytest.raises(TypeError, match="dtype is torch.float64; expected float32, float16 or bfloat16"):
        quantize_weight(torch.randn(4, 64)).dequantize(torch.float64)


def test_quantize_weight_errors():
    with pytest.raises(ValueError, match="quant_type is 'int8'"):
        quantize_weight(torch.ones(4), "int8")
    with pytest.raises(ValueError, match="block_size is 48"):
        quantize_weight(torch.ones(4), block_size=48)
    with pytest.raises(ValueError, match="NaN|infinite|finite"):
        quantize_weight(torch.tensor([torch.nan]))


def test_another_nested_block_size_is_not_written():
    w = quantize_weight(torch.randn(8, 64), double_quant=False)
    nested = DoubleQuantized(torch.zeros(8, dtype=torch.uint8), torch.zeros(2), torch.zeros(()), 4)
    with pytest.raises(ValueError, match="bitsandbytes reads 256 alone"):
        dataclasses.replace(w, absmax=nested).to_bitsandbytes()


# ---- bitsandbytes itself reads ours, and we read its


@pytest.mark.peers
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("double_quant", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_loads_ours(quant_type, double_quant, dtype):
    bnb = pytest.importorskip("bitsandbytes")
    w = quantize_weight(torch.randn(64, 128).to(dtype), quant_type, double_quant=double_quant)
    tensors = w.to_bitsandbytes()
    packed = tensors.pop("weight")
    statistics = {key.removeprefix("weight."): tensor for key, tensor in tensors.items()}
    state = bnb.functional.QuantState.from_dict(dict(statistics), torch.device("cpu"))
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(bnb.functional.dequantize_4bit(packed, state), w.dequantize())
        parameter = bnb.nn.Params4bit.from_prequantized(packed, dict(statistics), device="cpu")
        assert torch.equal(bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state), w.dequantize())


@pytest.mark.peers
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("double_quant", (True, False))
@pytest.mark.parametrize("storage", (torch.uint8, torch.bfloat16))
def test_ours_loads_bitsandbytes(quant_type, double_quant, storage, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file, save_file

    with torch.compiler.set_stance("force_eager"):
        layer = bnb.nn.Linear4bit(128, 64, False, torch.bfloat16, double_quant, quant_type, storage)
        layer.weight.data = torch.randn(64, 128).bfloat16()
        layer = layer.to("cpu")
        layer.weight = layer.weight if layer.weight.quant_state is not None else layer.weight._quantize("cpu")
        restored = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    save_file(layer.state_dict(prefix="layer."), tmp_path / "layer.safetensors")
    w = QuantizedWeight.from_bitsandbytes(load_file(tmp_path / "layer.safetensors"), "layer.")
    assert w.quant_type == quant_type and isinstance(w.absmax, DoubleQuantized) == double_quant
    assert torch.equal(w.dequantize(), restored)
    # what it saved is what we save, name by name
    theirs = layer.state_dict(prefix="layer.")
    ours = w.to_bitsandbytes("layer.")
    assert set(ours) == set(theirs)
    for key in ours:
        if "quant_state" not in key:
            expected = theirs[key].contiguous().view(-1).view(torch.uint8) if key == "layer.weight" else theirs[key]
            assert torch.equal(ours[key].flatten(), expected.flatten())
