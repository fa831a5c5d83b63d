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
from typing import Any

import numpy as np
import numpy.typing as npt

from rqc.runtime import zip_layout
from rqc.runtime.errors import EngineFormatError, InputError, ResourceError
from rqc.runtime.manifest import MAX_MANIFEST, parse_manifest
from rqc.runtime.onnx_walk import ExternalRef, bind, external_tensors, pad_location
from rqc.runtime.tensors import TensorEntry, TensorView, locate_tensors
from rqc.runtime.zip_layout import GRAPH, MANIFEST, WEIGHTS, Entry

__all__ = ["EngineFile", "TensorEntry", "check_path"]

MAX_GRAPH = (1 << 31) - 1  # bytes: the largest protobuf message
_CHUNK = 1 << 20  # bytes
_HINT = "copy or compile the engine again"
_RAW_PLANS = (b"ptrt", b"ftrt")  # the first bytes of a serialized TensorRT engine


class EngineFile:
    """An open engine. Everything but the weights was hashed at `open`; `check` hashes the weights too.

    `path` is the real path (ONNX Runtime refuses a link that leaves its folder), `directory` its folder, `manifest` the
    parsed manifest, `tensors` the tensors of weights.bin by name, `size_bytes` the size of the file.
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

        Raises InputError if there is no readable file or ONNX Runtime could not be given its path, EngineFormatError if
        it is no sound engine, ResourceError if it cannot be read to its end.
        """
        real = check_path(path)
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
        _refuse_others(self._read_at(0, min(self.size_bytes, 4)))
        entries = zip_layout.read_directory(self._read_at, self.size_bytes)
        names = [entry.name for entry in entries]
        if names[:1] != [MANIFEST]:
            raise EngineFormatError(f"not an rqc engine: a ZIP file that does not begin with {MANIFEST}", hint=_HINT)
        # the manifest first: if it names a newer format, nothing after this line is held against the file
        self.manifest = self._read_manifest(entries[0])
        if names != zip_layout.order(names):
            raise EngineFormatError(f"its entries are not {MANIFEST}, {GRAPH}, {WEIGHTS}, then by name", hint=_HINT)
        zip_layout.verify_structure(self._read_at, entries, self.size_bytes)
        self._entries = {entry.name: entry for entry in entries}
        self._match_manifest()
        for name in names:
            if name not in (MANIFEST, WEIGHTS):
                self._verify(name)
        self._refs = external_tensors(self.read(GRAPH))
        tensors = locate_tensors(self._refs, self._entries[WEIGHTS])
        self.tensors = {name: entry for name, (entry, _) in tensors.items()}
        self._views = {name: view for name, (_, view) in tensors.items()}
        self.graph()  # finds a location that cannot be bound

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

    def _verify(self, name: str) -> None:
        for _ in self.chunks(name):
            pass

    def names(self) -> list[str]:
        """The entries' names in the order of the file."""
        return list(self._entries)

    def has(self, name: str) -> bool:
        """Whether the engine holds an entry `name`."""
        return name in self._entries

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of the entry `name` piece by piece.

        Raises EngineFormatError if there is no such entry, and after the last piece if their sha256 or CRC-32 is wrong.
        """
        if name not in self._entries:
            raise EngineFormatError(f"{self.path} holds no {name!r}; it holds {', '.join(self._entries)}")
        entry, digest, crc = self._entries[name], hashlib.sha256(), 0
        for place in range(entry.start, entry.end, _CHUNK):
            chunk = self._read_at(place, min(_CHUNK, entry.end - place))
            digest.update(chunk)
            crc = zlib.crc32(chunk, crc)
            yield chunk
        # the manifest cannot hold its own hash
        if crc != entry.crc or (name != MANIFEST and digest.hexdigest() != self.manifest["entries"][name]["sha256"]):
            raise EngineFormatError(f"{name} is damaged: its checksum differs", hint=_HINT)

    def read(self, name: str) -> bytes:
        """The bytes of the entry `name`, hashed again as they are read. Raises EngineFormatError as `chunks` does."""
        return b"".join(self.chunks(name))

    def graph(self) -> bytes:
        """The ONNX model whose external data lies in this very file, by name in `directory`.

        ONNX Runtime needs the option session.model_external_initializers_file_folder_path = `directory`, and reads the
        weights by that path: call `confirm_path` when the session is there.
        """
        return self.graph_in(os.fsencode(os.path.basename(self.path)))

    def graph_in(self, name: bytes) -> bytes:
        """The same for a file of another name, such as a link to this one."""
        return bind(self.read(GRAPH), self._refs, name)

    def relocatable_graph(self) -> bytes:
        """The ONNX model with offsets counted from the start of weights.bin: what a writer takes."""
        return bind(self.read(GRAPH), self._refs, b"engine.plan", -self._entries[WEIGHTS].start)

    def size_of(self, name: str) -> int:
        """Bytes of an entry."""
        return self._entries[name].size

    def confirm_path(self) -> None:
        """Raise EngineFormatError if by now another file is at `path`: its weights are not this engine's."""
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            same = False
        if not same:
            raise EngineFormatError(f"{self.path} was replaced while it was loaded", hint="load it again")

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


def check_path(path: str | os.PathLike[str]) -> str:
    """The real path of `path`. Raises InputError unless an engine can lie there: UTF-8, a name of at most 254 bytes."""
    try:
        real = os.path.realpath(os.fspath(path))
        real.encode()  # ONNX Runtime takes paths as UTF-8
        pad_location(os.fsencode(os.path.basename(real)))
    except UnicodeEncodeError as error:
        raise InputError(f"the path {os.fspath(path)!r} is not valid UTF-8", hint="rename the engine") from error
    except ValueError as error:
        raise InputError(f"{os.fspath(path)!r}: {error}", hint="give the engine a shorter name") from error
    return real


def _open_regular(path: str) -> tuple[int, int]:
    """(descriptor, size in bytes) of the regular file at `path`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe must not block
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}", hint="give the path of an engine, e.g. engine.plan") from error
    except OSError as error:
        raise InputError(f"{path} cannot be opened ({error.strerror})", hint="give a readable engine") from error
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
    if start in _RAW_PLANS:
        raise EngineFormatError(
            "a raw TensorRT plan, not an rqc engine", hint="run it with TensorRT, or give the engine it was built from"
        )
    if not start.startswith(b"PK"):
        raise EngineFormatError("not an rqc engine: it does not begin as a ZIP file does", hint=_HINT)
