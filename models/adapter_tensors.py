"""The tensors of adapters and rotations: safetensors read as float64, written so that equal values give equal bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from rqc.runtime.errors import InputError, UnsupportedModelError

Array = NDArray[np.float64]
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize
_HINT = "the file is truncated or damaged: save it again"


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """All tensors of a safetensors file by name, float64, and its metadata.

    Raises InputError for a file that cannot be read and for NaN or infinite values (naming the tensor),
    UnsupportedModelError for tensors that are no floats.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}", hint=_HINT) from error
    return parse_tensors(content, path)


def parse_tensors(content: bytes, path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """The same for the bytes of a safetensors file that errors call `path`."""
    try:
        found = _deserialize(content)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} cannot be read: {error}", hint=_HINT) from error
    tensors = {}
    for name, entry in found:
        if entry["dtype"] not in _NUMPY:
            raise UnsupportedModelError(
                f"tensor {name!r} in {path.name} is of type {entry['dtype']}", hint="save it as floats"
            )
        raw = np.frombuffer(entry["data"], _NUMPY[entry["dtype"]]).reshape(entry["shape"])
        values = (raw.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else raw
        tensors[name] = values.astype(np.float64)
        if not np.isfinite(tensors[name]).all():
            raise InputError(
                f"tensor {name!r} in {path.name} holds NaN or infinite values",
                hint="its training diverged, or the file is damaged: train or save it again",
            )
    return tensors, _metadata(content)


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file that `safetensors` has checked."""
    (length,) = struct.unpack("<Q", content[:8])
    metadata: dict[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return metadata


def tensor_bytes(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with every tensor cast to float32, in the order of the names. (The library's own writer puts
    metadata in an order that changes from run to run.) Raises InputError where a value leaves float32's range."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    parts, place = [], 0
    for name in sorted(tensors):
        with np.errstate(over="ignore"):  # told below
            cast = np.ascontiguousarray(tensors[name], dtype="<f4")
        if not np.isfinite(cast).all():
            raise InputError(f"{name!r} holds values that float32 cannot", hint="train it again, at a lower rate")
        header[name] = {"dtype": "F32", "shape": list(cast.shape), "data_offsets": [place, place + cast.nbytes]}
        parts.append(cast.tobytes())
        place += cast.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *parts])
