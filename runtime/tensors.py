"""The tensors of weights.bin: what their references in graph.onnx declare, checked against where they lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rqc.runtime.errors import EngineFormatError
from rqc.runtime.onnx_walk import ExternalRef
from rqc.runtime.zip_layout import WEIGHTS, Entry

TENSOR_ALIGNMENT = 64  # bytes: a cache line, and the widest vector load
MAX_RANK = 16
_HINT = "copy or compile the engine again"

# ONNX data type -> (name, bits of an element, numpy type of the view); packed types are viewed as their bytes
_TYPES: dict[int, tuple[str, int, str]] = {
    1: ("float32", 32, "<f4"),
    2: ("uint8", 8, "u1"),
    3: ("int8", 8, "i1"),
    4: ("uint16", 16, "<u2"),
    5: ("int16", 16, "<i2"),
    6: ("int32", 32, "<i4"),
    7: ("int64", 64, "<i8"),
    9: ("bool", 8, "?"),
    10: ("float16", 16, "<f2"),
    11: ("float64", 64, "<f8"),
    12: ("uint32", 32, "<u4"),
    13: ("uint64", 64, "<u8"),
    14: ("complex64", 64, "<c8"),
    15: ("complex128", 128, "<c16"),
    16: ("bfloat16", 16, "<u2"),
    17: ("float8_e4m3fn", 8, "u1"),
    18: ("float8_e4m3fnuz", 8, "u1"),
    19: ("float8_e5m2", 8, "u1"),
    20: ("float8_e5m2fnuz", 8, "u1"),
    21: ("uint4", 4, "u1"),
    22: ("int4", 4, "u1"),
    23: ("float4_e2m1fn", 4, "u1"),
    24: ("float8_e8m0fnu", 8, "u1"),
    25: ("uint2", 2, "u1"),
    26: ("int2", 2, "u1"),
}


class TensorEntry(NamedTuple):
    """A tensor in weights.bin, at byte `offset` of the engine file; `dtype` is numpy's or ml_dtypes' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorView(NamedTuple):
    """How numpy sees a tensor's bytes: types that numpy lacks as unsigned integers, packed ones as flat bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def locate_tensors(refs: Sequence[ExternalRef], weights: Entry) -> dict[str, tuple[TensorEntry, TensorView]]:
    """The tensors by name. Raises EngineFormatError unless they are what they declare and fill the entry `weights`."""
    tensors = {ref.name: _locate(ref, weights) for ref in refs}
    spans = {(entry.offset, entry.nbytes): entry.name for entry, _ in tensors.values()}
    end = weights.start
    for (offset, length), name in sorted(spans.items()):
        # each at the next aligned byte; one place with one length may serve several tensors
        if offset != -(-end // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT:
            how = "overlaps the tensor before it" if offset < end else "leaves a gap before it"
            raise EngineFormatError(f"tensor {name!r} at byte {offset} {how}", hint=_HINT)
        end = offset + length
    if end != weights.end:
        raise EngineFormatError(f"{WEIGHTS} has {weights.end - end} bytes after its last tensor", hint=_HINT)
    return tensors


def _locate(ref: ExternalRef, weights: Entry) -> tuple[TensorEntry, TensorView]:
    """The tensor of a reference, checked on its own: type, shape, length, alignment, bounds."""
    place = f"tensor {ref.name!r}"
    if ref.data_type not in _TYPES:
        raise EngineFormatError(f"{place} has ONNX data type {ref.data_type}, which engines do not hold", hint=_HINT)
    dtype, bits, view = _TYPES[ref.data_type]
    if len(ref.shape) > MAX_RANK or any(dim < 0 for dim in ref.shape):
        raise EngineFormatError(f"{place} has shape {ref.shape[:MAX_RANK]}", hint=_HINT)
    nbytes = -(-math.prod(ref.shape) * bits // 8)
    if nbytes != ref.length:
        what = f"{place} of type {dtype} and shape {ref.shape}"
        raise EngineFormatError(f"{what} has {ref.length} bytes instead of {nbytes}", hint=_HINT)
    if ref.offset % TENSOR_ALIGNMENT:
        raise EngineFormatError(f"{place} at byte {ref.offset} is not aligned to {TENSOR_ALIGNMENT} bytes", hint=_HINT)
    if not weights.start <= ref.offset <= weights.end - ref.length:
        raise EngineFormatError(f"{place} at byte {ref.offset} lies outside {WEIGHTS}", hint=_HINT)
    shape = ref.shape if bits >= 8 else (nbytes,)
    return TensorEntry(ref.name, dtype, ref.shape, ref.offset, ref.length), TensorView(np.dtype(view), shape)
