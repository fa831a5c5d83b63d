"""Reading an engine: a ZIP file of stored entries that is checked before anything in it is used."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import stat
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rqc.runtime import zip_layout
from rqc.runtime.errors import EngineFormatError, InputError, ResourceError
from rqc.runtime.manifest import MAX_MANIFEST, parse_manifest
from rqc.runtime.onnx_walk import ExternalRef, bind, external_tensors, pad_location
from rqc.runtime.zip_layout import GRAPH, MANIFEST, WEIGHTS, Entry

TENSOR_ALIGNMENT = 64  # bytes: a cache line, and the widest vector load
MAX_GRAPH = (1 << 31) - 1  # bytes: the largest protobuf message
_CHUNK = 1 << 20
_HINT = "copy or compile the engine again"
_RAW_PLANS = (b"ptrt", b"ftrt")  # the first bytes of a serialized TensorRT engine

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
    16: ("bfloat16", 16, "<u2"),
    17: ("float8_e4m3fn", 8, "u1"),
    19: ("float8_e5m2", 8, "u1"),
    21: ("uint4", 4, "u1"),
    22: ("int4", 4, "u1"),
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


class EngineFile:
    """An open engine. Everything but the weights was hashed at `open`; `check` hashes the weights too.

    `path` is the real path (ONNX Runtime refuses a link that leaves its folder), `directory` its folder, `manifest` the
    parsed manifest, `tensors` the tensors of weights.bin by name.
    """

    def __init__(self, path: str, descriptor: int, size_bytes: int) -> None:
        """Take over the descriptor of an open regular file; use `open`."""
        self.path = path
        self.directory = os.path.dirname(path)
        self.size_bytes = size_bytes
        self.manifest: dict[str, Any] = {}
        self.tensors: dict[str, TensorEntry] = {}
        self._descriptor = descriptor
        self._entries: dict[str, Entry] = {}
        self._refs: list[ExternalRef] = []
        self._views: dict[str, TensorView] = {}
        self._map: mmap.mmap | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], check: bool = False) -> EngineFile:
        """Open and check the engine at `path`; with `check`, hash the weights too.

        Raises InputError if there is no readable file or its name cannot be bound, EngineFormatError if it is no sound
        engine.
        """
        real = os.path.realpath(os.fspath(path))
        _location(os.path.basename(real))
        descriptor, size = _open_regular(real)
        engine = cls(real, descriptor, size)
        try:
            engine._load()
            if check:
                engine.check()
        except EngineFormatError as error:
            engine.close()
            raise EngineFormatError(f"{os.fspath(path)}: {error.message}", hint=error.hint) from error
        except BaseException:
            engine.close()
            raise
        return engine

    def _load(self) -> None:
        _refuse_others(self._read_at(0, min(self.size_bytes, 64)))
        entries = zip_layout.read_directory(self._read_at, self.size_bytes)
        names = [entry.name for entry in entries]
        if names[:3] != [MANIFEST, GRAPH, WEIGHTS] or names != zip_layout.order(names):
            raise EngineFormatError(f"its entries are not {MANIFEST}, {GRAPH}, {WEIGHTS}, then by name", hint=_HINT)
        self._entries = {entry.name: entry for entry in entries}
        # the manifest first: if it names a newer format, nothing after this line is held against the file
        self.manifest = self._read_manifest(entries[0])
        zip_layout.verify_structure(self._read_at, entries, self.size_bytes)
        self._match_manifest()
        for name in names:
            if name not in (MANIFEST, WEIGHTS):
                self._verify(name)
        graph = self.read(GRAPH)
        self._refs = external_tensors(graph)
        self._check_tensors(graph)

    def _read_at(self, place: int, length: int) -> bytes:
        """`length` bytes from byte `place` of the file; EngineFormatError if it ends before that."""
        parts: list[bytes] = []
        while length:
            try:
                part = os.pread(self._descriptor, length, place)
            except OSError as error:
                raise ResourceError(f"{self.path} cannot be read ({error.strerror})", hint="check the disk") from error
            if not part:
                raise EngineFormatError(f"the file ends at byte {place}", hint=_HINT)
            parts.append(part)
            place, length = place + len(part), length - len(part)
        return b"".join(parts)

    def _read_manifest(self, entry: Entry) -> dict[str, Any]:
        if entry.size > MAX_MANIFEST:
            raise EngineFormatError(f"{MANIFEST} has {entry.size} bytes, more than {MAX_MANIFEST}", hint=_HINT)
        data = self._read_at(entry.start, entry.size)
        if zlib.crc32(data) != entry.crc:
            raise EngineFormatError(f"{MANIFEST} is damaged: its checksum differs", hint=_HINT)
        return parse_manifest(data)

    def _match_manifest(self) -> None:
        """Raise EngineFormatError unless the manifest lists exactly the entries of the ZIP directory."""
        listed = self.manifest["entries"]
        names = set(self._entries) - {MANIFEST}
        if set(listed) != names:
            raise EngineFormatError(f"manifest and ZIP differ in {sorted(set(listed) ^ names)[:5]}", hint=_HINT)
        for name, claim in listed.items():
            entry = self._entries[name]
            if (claim["offset"], claim["size"]) != (entry.start, entry.size):
                raise EngineFormatError(f"the manifest has {name} at another place or with another size", hint=_HINT)
        if self._entries[GRAPH].size > MAX_GRAPH:
            raise EngineFormatError(f"{GRAPH} has more than {MAX_GRAPH} bytes", hint=_HINT)

    def _chunks(self, entry: Entry) -> Iterator[bytes]:
        for place in range(entry.start, entry.end, _CHUNK):
            yield self._read_at(place, min(_CHUNK, entry.end - place))

    def _verify(self, name: str) -> None:
        """Raise EngineFormatError if the entry's bytes have another sha256 or CRC-32 than the engine says."""
        entry, digest, crc = self._entries[name], hashlib.sha256(), 0
        for chunk in self._chunks(entry):
            digest.update(chunk)
            crc = zlib.crc32(chunk, crc)
        if crc != entry.crc or (name != MANIFEST and digest.hexdigest() != self.manifest["entries"][name]["sha256"]):
            raise EngineFormatError(f"{name} is damaged: its checksum differs", hint=_HINT)

    def _check_tensors(self, graph: bytes) -> None:
        """Fill `tensors`, or raise EngineFormatError for one that does not lie in weights.bin as the format says."""
        weights = self._entries[WEIGHTS]
        # binding once finds a location of another length; what the location says is replaced by `graph` and never used
        bind(graph, self._refs, os.fsencode(os.path.basename(self.path)))
        for ref in self._refs:
            self._views[ref.name], self.tensors[ref.name] = _tensor(ref, weights)
        _check_spans({(entry.offset, entry.nbytes): entry.name for entry in self.tensors.values()}, weights)

    def names(self) -> list[str]:
        """The entries' names in the order of the file."""
        return list(self._entries)

    def has(self, name: str) -> bool:
        """Whether the engine holds an entry `name`."""
        return name in self._entries

    def read(self, name: str) -> bytes:
        """The bytes of the entry `name`, hashed again as they are read. Raises EngineFormatError."""
        if name not in self._entries:
            raise EngineFormatError(f"{self.path} holds no {name!r}; it holds {', '.join(self._entries)}")
        entry = self._entries[name]
        data = self._read_at(entry.start, entry.size)
        if zlib.crc32(data) != entry.crc or (
            name != MANIFEST and hashlib.sha256(data).hexdigest() != self.manifest["entries"][name]["sha256"]
        ):
            raise EngineFormatError(f"{name} is damaged: its checksum differs", hint=_HINT)
        return data

    def graph(self) -> bytes:
        """The ONNX model whose external data lies in this very file, by name in `directory`.

        ONNX Runtime needs the session option session.model_external_initializers_file_folder_path = `directory`.
        """
        return bind(self.read(GRAPH), self._refs, os.fsencode(os.path.basename(self.path)))

    def standalone_graph(self) -> bytes:
        """The ONNX model whose external data lies in a file weights.bin beside it: what `extract` writes."""
        return bind(self.read(GRAPH), self._refs, WEIGHTS.encode(), -self._entries[WEIGHTS].start)

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """The external tensor `name` as a read-only view of the mapped file, of its shape.

        bfloat16 comes as uint16, float8 as uint8; types of less than a byte as the flat uint8 array of packed bytes.
        """
        if name not in self.tensors:
            raise EngineFormatError(f"{self.path} has no external tensor {name!r}")
        if self._map is None:
            self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        view, entry = self._views[name], self.tensors[name]
        flat = np.frombuffer(self._map, view.dtype, math.prod(view.shape), entry.offset)
        return flat.reshape(view.shape)

    def check(self) -> None:
        """Hash every entry, the weights too. Raises EngineFormatError for the first that is damaged."""
        for name in self._entries:
            self._verify(name)

    def close(self) -> None:
        """Close the file. Arrays of `tensor` stay valid: the map goes with the last of them."""
        self._map = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> EngineFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _location(name: str) -> bytes:
    """The padded location of an engine called `name`; InputError if it has none."""
    try:
        name.encode()  # ONNX Runtime takes paths as UTF-8
        return pad_location(os.fsencode(name))
    except UnicodeEncodeError as error:
        raise InputError(f"the file name {name!r} is not valid UTF-8", hint="rename the engine") from error
    except ValueError as error:
        raise InputError(str(error), hint="rename the engine to a shorter name") from error


def check_file_name(name: str) -> None:
    """Raise InputError unless an engine can be called `name`: valid UTF-8, at most 254 bytes."""
    _location(name)


def _open_regular(path: str) -> tuple[int, int]:
    """(descriptor, size in bytes) of the regular file at `path`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe must not block
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}", hint="give the path of an engine, e.g. engine.plan") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path!r} cannot be opened ({error})", hint="give the path of a readable engine") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise EngineFormatError(f"{path} is {what}, not an engine", hint="give the path of an engine, e.g. engine.plan")
    return descriptor, status.st_size


def _refuse_others(start: bytes) -> None:
    """Raise EngineFormatError, saying what it is, if a file with these first bytes cannot be an engine."""
    if not start:
        raise EngineFormatError("the file is empty", hint=_HINT)
    if start[:4] in _RAW_PLANS:
        raise EngineFormatError(
            "a raw TensorRT plan, not an rqc engine", hint="run it with TensorRT, or give the engine it was built from"
        )
    if not start.startswith(b"PK"):
        raise EngineFormatError("not an rqc engine: it does not begin as a ZIP file does", hint=_HINT)


def _tensor(ref: ExternalRef, weights: Entry) -> tuple[TensorView, TensorEntry]:
    """The tensor of a reference, checked on its own: type, shape, length, alignment, bounds."""
    place = f"tensor {ref.name!r}"
    if ref.data_type not in _TYPES:
        raise EngineFormatError(f"{place} has ONNX data type {ref.data_type}, which engines do not hold", hint=_HINT)
    name, bits, numpy_type = _TYPES[ref.data_type]
    if any(dim < 0 for dim in ref.shape) or len(ref.shape) > 16:
        raise EngineFormatError(f"{place} has shape {ref.shape[:17]}", hint=_HINT)
    nbytes = -(-math.prod(ref.shape) * bits // 8)
    if nbytes != ref.length:
        raise EngineFormatError(
            f"{place} of type {name} and shape {ref.shape} has {ref.length} bytes instead of {nbytes}", hint=_HINT
        )
    if ref.offset % TENSOR_ALIGNMENT:
        raise EngineFormatError(f"{place} at byte {ref.offset} is not aligned to {TENSOR_ALIGNMENT} bytes", hint=_HINT)
    if not weights.start <= ref.offset <= weights.end - ref.length:
        raise EngineFormatError(f"{place} at byte {ref.offset} lies outside {WEIGHTS}", hint=_HINT)
    view = TensorView(np.dtype(numpy_type), ref.shape if bits >= 8 else (nbytes,))
    return view, TensorEntry(ref.name, name, ref.shape, ref.offset, ref.length)


def _check_spans(spans: dict[tuple[int, int], str], weights: Entry) -> None:
    """Raise EngineFormatError unless the (offset, length) spans fill weights.bin, each at the next aligned byte."""
    end = weights.start
    for (offset, length), name in sorted(spans.items()):
        expected = -(-end // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
        if offset != expected:
            how = "overlaps the tensor before it" if offset < end else "leaves a gap before it"
            raise EngineFormatError(f"tensor {name!r} at byte {offset} {how}", hint=_HINT)
        end = offset + length
    if end != weights.end:
        raise EngineFormatError(f"{WEIGHTS} has {weights.end - end} bytes after its last tensor", hint=_HINT)
