"""Where a serialized ONNX model refers to bytes outside itself: a protobuf walk that needs no protobuf library.

Source: protobuf.dev/programming-guides/encoding; field numbers from onnx.proto (ONNX 1.23). Only tensors matter: the
walk goes through every message that can hold one and skips the rest by its length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rqc.runtime.errors import EngineFormatError

LOCATION_SIZE = 256  # bytes of every location, so that another file name of any length fits in the same place
OFFSET_DIGITS = 12
MAX_DEPTH = 64  # nested messages; protobuf itself stops at 100

Span = tuple[int, int]  # first byte and the byte after the last one, in the serialized model
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 10: "tensor", 6: "graph", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_ROOT = "root graph"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DATA_FIELDS = {4: "float", 5: "int32", 6: "string", 7: "int64", 9: "raw", 10: "double", 11: "uint64", 3: "segment"}
_HINT = "copy or compile the engine again"


@dataclass(frozen=True)
class ExternalRef:
    """An initializer whose bytes lie outside the model: what it declares, and where its reference is written."""

    name: str
    data_type: int  # ONNX TensorProto.DataType
    shape: tuple[int, ...]
    offset: int
    length: int
    location_span: Span
    offset_span: Span


def _damaged(what: str) -> EngineFormatError:
    return EngineFormatError(f"graph.onnx: {what}", hint=_HINT)


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
    raise _damaged(f"no valid protobuf number before byte {at}")


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, value or first byte, byte after) of each field of the message in data[at:end]."""
    while at < end:
        key, at = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        if number == 0 or key >> 32:  # other parsers drop the bits above 32, and would see another field here
            raise _damaged(f"an invalid field number before byte {at}")
        if wire == _VARINT:
            value, at = _varint(data, at, end)
            yield number, wire, value, at
            continue
        if wire == _BYTES:
            size, at = _varint(data, at, end)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise _damaged(f"protobuf wire type {wire} before byte {at}")
        if size > end - at:
            raise _damaged(f"a field before byte {at} does not fit in its message")
        yield number, wire, at, at + size
        at += size


def external_tensors(model: bytes) -> list[ExternalRef]:
    """Every external reference of the serialized ModelProto `model`, in the order of its initializers.

    Raises EngineFormatError if the bytes are no protobuf message, if a tensor elsewhere than among the main graph's
    initializers is external, or if a reference lacks or repeats location, offset or length.
    """
    found: list[ExternalRef] = []
    pending: list[tuple[str, int, int, int]] = [("model", 0, len(model), 0)]
    roots = 0
    while pending:
        kind, start, end, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise _damaged(f"messages nested deeper than {MAX_DEPTH}")
        children = _CHILDREN["graph" if kind == _ROOT else kind]
        for number, wire, first, after in _fields(model, start, end):
            child = children.get(number)
            if child is None:
                continue
            if wire != _BYTES:
                raise _damaged(f"field {number} of a {kind} has wire type {wire}")
            if child == "tensor":
                if (ref := _tensor(model, first, after, allowed=kind == _ROOT)) is not None:
                    found.append(ref)
                continue
            if kind == "model" and child == "graph":
                roots, child = roots + 1, _ROOT
            pending.append((child, first, after, depth + 1))
    if roots != 1:
        raise _damaged(f"{roots} main graphs instead of one")
    if len({ref.name for ref in found}) != len(found):
        raise _damaged("two external initializers have the same name")
    return found


def _tensor(data: bytes, start: int, end: int, *, allowed: bool) -> ExternalRef | None:
    """The external reference of the TensorProto in data[start:end], or None if it holds its bytes itself."""
    name, dims, payload = "", [], ""
    numbers: dict[int, int] = {2: 0, 14: 0}
    entries: list[Span] = []
    for number, wire, first, after in _fields(data, start, end):
        if number == 13 and wire == _BYTES:
            entries.append((first, after))
        elif number in (2, 8, 14):
            if wire != (_BYTES if number == 8 else _VARINT):
                raise _damaged(f"field {number} of a tensor has wire type {wire}")
            if number == 8:
                name = data[first:after].decode("utf-8", "backslashreplace")
            else:
                numbers[number] = first
        elif number == 1:
            dims += [first] if wire == _VARINT else _packed(data, first, after, wire)
        elif number in _DATA_FIELDS:
            payload = _DATA_FIELDS[number]
    if not entries and numbers[14] == 0:
        return None
    if not allowed:
        raise _damaged(f"tensor {name!r} is external but no initializer of the main graph")
    if numbers[14] != 1 or payload:
        raise _damaged(f"tensor {name!r} is both external and inline ({payload or 'no external location flag'})")
    shape = tuple(dim - (1 << 64) if dim >> 63 else dim for dim in dims)
    return _reference(data, name, numbers[2], shape, entries)


def _packed(data: bytes, at: int, end: int, wire: int) -> list[int]:
    if wire != _BYTES:
        raise _damaged(f"a shape with wire type {wire}")
    values = []
    while at < end:
        value, at = _varint(data, at, end)
        values.append(value)
    return values


def _reference(data: bytes, name: str, data_type: int, shape: tuple[int, ...], entries: list[Span]) -> ExternalRef:
    spans: dict[bytes, Span] = {}
    for start, end in entries:
        parts = {number: (first, after) for number, wire, first, after in _fields(data, start, end) if wire == _BYTES}
        key = data[slice(*parts.get(1, (0, 0)))]
        if key in spans or key not in (b"location", b"offset", b"length") or 2 not in parts:
            raise _damaged(f"tensor {name!r} has an unknown, empty or repeated external entry {key[:40]!r}")
        spans[key] = parts[2]
    for key in (b"location", b"offset", b"length"):
        if key not in spans:
            raise _damaged(f"tensor {name!r} has no external {key.decode()}")
    offset, length = data[slice(*spans[b"offset"])], data[slice(*spans[b"length"])]
    if not re.fullmatch(rb"[0-9]{%d}" % OFFSET_DIGITS, offset):
        raise _damaged(f"tensor {name!r} has offset {offset[:40]!r} instead of {OFFSET_DIGITS} digits")
    if not re.fullmatch(rb"[1-9][0-9]{0,11}", length):
        raise _damaged(f"tensor {name!r} has length {length[:40]!r}")
    return ExternalRef(name, data_type, shape, int(offset), int(length), spans[b"location"], spans[b"offset"])


def pad_location(name: bytes) -> bytes:
    """`name` as a relative path of exactly LOCATION_SIZE bytes: './' repeated in front, one of them './/' if odd.

    Raises ValueError if no such path exists: the name is 255 bytes long or has more than LOCATION_SIZE.
    """
    missing = LOCATION_SIZE - len(name)
    if missing < 0 or missing == 1:
        raise ValueError(f"a file name of {len(name)} bytes does not fit in {LOCATION_SIZE}")
    odd = missing % 2
    return b"./" * ((missing - 3 * odd) // 2) + b".//" * odd + name


def bind(model: bytes, refs: list[ExternalRef], name: bytes, shift: int = 0) -> bytes:
    """`model` with every reference of `refs` (its own) pointing into the file `name`, `shift` bytes further on."""
    location = pad_location(name)
    bound = bytearray(model)
    for ref in refs:
        first, after = ref.location_span
        if after - first != LOCATION_SIZE:
            raise _damaged(f"tensor {ref.name!r} has a location of {after - first} bytes instead of {LOCATION_SIZE}")
        bound[first:after] = location
        first, after = ref.offset_span
        bound[first:after] = str(ref.offset + shift).zfill(OFFSET_DIGITS).encode()
    return bytes(bound)
