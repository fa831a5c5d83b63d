"""Writing an engine: an ONNX model, a manifest and files become one ZIP file that ONNX Runtime maps."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir

from rqc.compiler.lazy_errors import own_errors
from rqc.passes.base import LATE, STORAGE
from rqc.runtime.engine_writer import DEFAULT_NAME, Append, EngineSummary, Weights, write_parts
from rqc.runtime.errors import EngineFormatError
from rqc.runtime.onnx_walk import OFFSET_DIGITS, pad_location
from rqc.runtime.tensors import TENSOR_ALIGNMENT

INLINE_BELOW = 1024  # bytes: smaller tensors stay in graph.onnx, where shape inference sees them
_CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class _Storage:
    """A tensor that is written once, at byte `offset` of weights.bin; `name` is that of its first initializer."""

    name: str
    tensor: onnx_ir.TensorProtocol
    offset: int
    nbytes: int


def write_engine(
    path: str | os.PathLike[str],
    model: onnx_ir.Model,
    manifest: Mapping[str, Any],
    files: Mapping[str, bytes],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> EngineSummary:
    """Write `model`, `manifest` and `files` (entry name -> bytes) as the engine at `path`, over one that is there.

    Initializers of the main graph from 1 KiB on go to weights.bin, evaluated once and one after the other; those with
    the same `tensor.meta["rqc.storage"]` share their bytes. The file depends on the arguments alone, not on `path`.
    `progress` hears (label, bytes done, bytes in all) after every tensor.
    Raises EngineFormatError if `path` is something else than an engine or the parts make no sound engine, InputError if
    `path` cannot be written, ResourceError if the disk is full; then, as on any exception, nothing is left behind.
    """
    storages, graph = _split(model)
    size = storages[-1].offset + storages[-1].nbytes if storages else 0
    weights = Weights(size, lambda append: _evaluated(storages, append, progress))
    return write_parts(path, manifest, graph, weights, files)


def _split(model: onnx_ir.Model) -> tuple[list[_Storage], bytes]:
    """(what goes to weights.bin, the serialized model whose offsets count from the start of weights.bin)."""
    storages: dict[Hashable, _Storage] = {}
    external: dict[str, _Storage] = {}
    end = 0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise EngineFormatError(f"initializer {name!r} has no value")
        small = tensor.nbytes < INLINE_BELOW and LATE not in tensor.meta
        if tensor.dtype == onnx_ir.DataType.STRING or small:
            continue
        key = tensor.meta.get(STORAGE)
        key = ("object", id(tensor)) if key is None else ("storage", key)
        if key not in storages:
            offset = -(-end // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
            storages[key] = _Storage(name, tensor, offset, tensor.nbytes)
            end = offset + tensor.nbytes
        if storages[key].nbytes != tensor.nbytes:
            raise EngineFormatError(f"initializer {name!r} shares the bytes of a tensor of another size")
        external[name] = storages[key]
    return list(storages.values()), _serialize(model, external)


def _serialize(model: onnx_ir.Model, external: Mapping[str, _Storage]) -> bytes:
    """`model` as a serialized ModelProto without the bytes of the `external` initializers; the model stays as it is."""
    location = pad_location(DEFAULT_NAME).decode()
    values = [(name, value, value.const_value) for name, value in model.graph.initializers.items()]
    try:
        for name, value, tensor in values:
            if name in external and tensor is not None:
                shape = onnx_ir.Shape(tensor.shape.numpy())
                value.const_value = onnx_ir.ExternalTensor(
                    location, 0, tensor.nbytes, tensor.dtype, shape=shape, name=name
                )
            elif isinstance(tensor, onnx_ir.ExternalTensor):  # a small one, in a file of its own
                value.const_value = onnx_ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
        with own_errors():
            proto = onnx_ir.serde.serialize_model(model)
    finally:
        for _, value, tensor in values:
            value.const_value = tensor
    for initializer in proto.graph.initializer:
        if initializer.name in external:
            _refer(initializer, location, external[initializer.name])
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _refer(initializer: onnx.TensorProto, location: str, storage: _Storage) -> None:
    del initializer.external_data[:]
    # of constant length, so that the size of graph.onnx is known before the place of the weights
    offset = str(storage.offset).zfill(OFFSET_DIGITS)
    for key, value in (("location", location), ("offset", offset), ("length", str(storage.nbytes))):
        initializer.external_data.add(key=key, value=value)


def _evaluated(storages: Sequence[_Storage], append: Append, progress: Callable[[str, int, int], None] | None) -> None:
    """The bytes of weights.bin, one tensor in memory at a time."""
    end = 0
    for storage in storages:
        append(memoryview(bytes(storage.offset - end)))
        _evaluate(storage.name, storage.tensor, append)
        end = storage.offset + storage.nbytes
        if progress is not None:
            progress("weights", end, storages[-1].offset + storages[-1].nbytes)


def _evaluate(name: str, tensor: onnx_ir.TensorProtocol, append: Append) -> None:
    """Give the tensor's little-endian bytes to `append`, from one evaluation whose array is gone on return.

    Raises EngineFormatError if the tensor is not what it declares.
    """
    if tensor.dtype.bitwidth < 8:
        data = memoryview(tensor.tobytes())
        right, what = len(data) == tensor.nbytes, f"{len(data)} bytes"
    else:
        array = np.asarray(tensor.numpy(), order="C")
        right = array.dtype == tensor.dtype.numpy() and array.shape == tuple(tensor.shape.numpy())
        what = f"{array.dtype}{list(array.shape)}"
        data = array.reshape(-1).view(np.uint8).data
    if not right:
        raise EngineFormatError(f"initializer {name!r} declares {tensor.dtype}{tensor.shape} but is {what}")
    for at in range(0, len(data), _CHUNK):
        append(data[at : at + _CHUNK])
