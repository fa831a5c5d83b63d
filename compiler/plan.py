"""Writing an engine: an ONNX model, a manifest and files become one ZIP file that ONNX Runtime maps."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir

from rqc.compiler.lazy_errors import own_errors
from rqc.compiler.replace_file import Replacement, explained
from rqc.runtime import zip_layout
from rqc.runtime.container import EngineFile, check_path
from rqc.runtime.errors import EngineFormatError, ResourceError
from rqc.runtime.manifest import FORMAT, FORMAT_VERSION, parse_manifest
from rqc.runtime.onnx_walk import OFFSET_DIGITS, bind, external_tensors, pad_location
from rqc.runtime.tensors import TENSOR_ALIGNMENT, locate_tensors
from rqc.runtime.zip_layout import GRAPH, MANIFEST, WEIGHTS, Entry

INLINE_BELOW = 1024  # bytes: smaller tensors stay in graph.onnx, where shape inference sees them
STORAGE_KEY = "rqc.storage"  # tensors with the same value in `meta` share their bytes
_DEFAULT_NAME = b"engine.plan"  # graph.onnx as it lies in the file must not depend on where the engine was written
_CHUNK = 1 << 22
_MAGIC = f'{{\n "format": "{FORMAT}",'.encode()


@dataclass(frozen=True)
class EngineSummary:
    """What was written: the file's size, the size of its weights.bin (both in bytes) and the file's sha256."""

    size_bytes: int
    weight_bytes: int
    sha256: str


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
    target = check_target(path)
    contents = {name: bytes(files[name]) for name in files}
    if reserved := set(contents) & {MANIFEST, GRAPH, WEIGHTS}:
        raise EngineFormatError(f"{', '.join(sorted(reserved))} cannot be given as a file of an engine")
    zip_layout.check_names([MANIFEST, GRAPH, WEIGHTS, *contents])
    storages, template = _split(model)
    contents[GRAPH] = template
    weight_bytes = storages[-1].offset + storages[-1].nbytes if storages else 0
    entries = _lay_out(manifest, {name: len(data) for name, data in contents.items()} | {WEIGHTS: weight_bytes})
    weights = next(entry for entry in entries if entry.name == WEIGHTS)
    contents[GRAPH] = bind(template, external_tensors(template), _DEFAULT_NAME, weights.start)
    # what the reader refuses shows here, and not after the hours of folding
    locate_tensors(external_tensors(contents[GRAPH]), weights)
    size = entries[-1].end + len(zip_layout.tail_bytes(entries))
    with Replacement(target, size) as new:
        digest, crc = _stream(new, storages, weights, progress)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()} | {WEIGHTS: digest}
        contents[MANIFEST] = _manifest_text(manifest, entries, digests)
        crcs = {name: zlib.crc32(data) for name, data in contents.items()} | {WEIGHTS: crc}
        _write_around(new, [replace(entry, crc=crcs[entry.name]) for entry in entries], contents)
        EngineFile.open(new.temporary, check=True).close()
        sha256 = _sha256(new.temporary)
        _refuse_foreign(target)
        new.commit()
    return EngineSummary(size, weight_bytes, sha256)


def check_target(path: str | os.PathLike[str]) -> str:
    """The real path of an engine that is to be written at `path`, before anything has been computed for it.

    Raises InputError if none can lie there, EngineFormatError if something else does.
    """
    target = check_path(path)
    _refuse_foreign(target)
    with explained(target):
        os.stat(os.path.join(os.path.dirname(target), ""))
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)  # a name that is too long shows
    return target


def _refuse_foreign(path: str) -> None:
    """Raise EngineFormatError if `path` exists and is not an engine (a damaged engine may be replaced)."""
    with explained(path):
        if not os.path.lexists(path):
            return
        if stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "rb") as file:
                start = file.read(zip_layout.ENTRY_ALIGNMENT + len(_MAGIC))
            if start.startswith(b"PK\3\4") and start.endswith(_MAGIC):
                return
    raise EngineFormatError(f"{path} exists and is not an engine", hint="give another path, or remove it yourself")


def _split(model: onnx_ir.Model) -> tuple[list[_Storage], bytes]:
    """(what goes to weights.bin, the serialized model whose offsets count from the start of weights.bin)."""
    storages: dict[Hashable, _Storage] = {}
    external: dict[str, _Storage] = {}
    end = 0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise EngineFormatError(f"initializer {name!r} has no value")
        if tensor.dtype == onnx_ir.DataType.STRING or tensor.nbytes < INLINE_BELOW:
            continue
        key = tensor.meta.get(STORAGE_KEY)
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
    location = pad_location(_DEFAULT_NAME).decode()
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


def _place(sizes: Sequence[tuple[str, int]]) -> list[Entry]:
    """Entries of these (name, size) one after the other, each aligned; their checksums are still 0."""
    skipped = [0] * len(sizes)
    while True:
        entries: list[Entry] = []
        for index, (name, size) in enumerate(sizes):
            step = zip_layout.alignment(name)
            header = entries[-1].end if entries else 0
            fixed = header + zip_layout.LOCAL_SIZE + len(name)
            least = fixed + len(zip_layout.local_zip64(size)) + zip_layout.MIN_PADDING
            start = (math.ceil(least / step) + skipped[index]) * step
            if start - fixed > zip_layout.MAX_EXTRA:
                # the padding is a few bytes longer than a header can hold: move the entry before it, and so this header
                skipped[index - 1] += 1
                break
            entries.append(Entry(name, size, 0, header, start))
        else:
            return entries


def _lay_out(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> list[Entry]:
    """The entries of these sizes and of the manifest in their places.

    The manifest names the places, which depend on its length: both only grow from round to round, until they agree.
    """
    length = 0
    while True:
        given = {**sizes, MANIFEST: length}
        entries = _place([(name, given[name]) for name in zip_layout.order(list(given))])
        text = _manifest_text(manifest, entries, dict.fromkeys(given, "0" * 64))
        if len(text) == length:
            break
        length = len(text)
    if entries[-1].end >= 10**OFFSET_DIGITS:
        raise ResourceError("an engine has at most a terabyte", hint="choose a smaller model")
    parse_manifest(text)
    return entries


def _manifest_text(manifest: Mapping[str, Any], entries: Sequence[Entry], digests: Mapping[str, str]) -> bytes:
    """manifest.json with keys in an order that does not depend on how the manifest was put together."""
    listed = {
        entry.name: {"offset": entry.start, "size": entry.size, "sha256": digests[entry.name]}
        for entry in entries
        if entry.name != MANIFEST
    }
    head = {"format": FORMAT, "format_version": FORMAT_VERSION}
    body = json.loads(json.dumps(dict(manifest), sort_keys=True, allow_nan=False))
    text = json.dumps(head | body | head | {"entries": listed}, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def _stream(
    new: Replacement,
    storages: Sequence[_Storage],
    weights: Entry,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[str, int]:
    """Write weights.bin, one tensor in memory at a time; return its (sha256, CRC-32)."""
    digest, crc, end = hashlib.sha256(), 0, 0

    def append(data: memoryview) -> None:
        nonlocal crc, end
        new.write(data, weights.start + end)
        digest.update(data)
        crc = zlib.crc32(data, crc)
        end += len(data)

    for storage in storages:
        append(memoryview(bytes(storage.offset - end)))
        _evaluate(storage.name, storage.tensor, append)
        if progress is not None:
            progress("weights", end, storages[-1].offset + storages[-1].nbytes)
    return digest.hexdigest(), crc


def _evaluate(name: str, tensor: onnx_ir.TensorProtocol, append: Callable[[memoryview], None]) -> None:
    """Give the tensor's little-endian bytes to `append`, from one evaluation whose array is gone on return.

    Raises EngineFormatError if the tensor is not what it declares.
    """
    if tensor.dtype.bitwidth < 8:
        data = memoryview(tensor.tobytes())
        right, what = len(data) == tensor.nbytes, f"{len(data)} bytes"
    else:
        array = np.ascontiguousarray(tensor.numpy())
        right = array.dtype == tensor.dtype.numpy() and array.shape == tuple(tensor.shape.numpy())
        what = f"{array.dtype}{list(array.shape)}"
        data = array.reshape(-1).view(np.uint8).data
    if not right:
        raise EngineFormatError(f"initializer {name!r} declares {tensor.dtype}{tensor.shape} but is {what}")
    for at in range(0, len(data), _CHUNK):
        append(data[at : at + _CHUNK])


def _write_around(new: Replacement, entries: Sequence[Entry], contents: Mapping[str, bytes]) -> None:
    """Write everything but the data of weights.bin."""
    for entry in entries:
        new.write(zip_layout.local_bytes(entry), entry.header)
        if entry.name != WEIGHTS:
            new.write(contents[entry.name], entry.start)
    new.write(zip_layout.tail_bytes(entries), entries[-1].end)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
