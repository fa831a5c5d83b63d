"""Writing an engine file: entries laid out, weights streamed, everything hashed, then put in place at once."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rqc.runtime import zip_layout
from rqc.runtime.container import EngineFile, check_path
from rqc.runtime.errors import EngineFormatError, ResourceError
from rqc.runtime.manifest import FORMAT, FORMAT_VERSION, parse_manifest
from rqc.runtime.onnx_walk import OFFSET_DIGITS, bind, external_tensors
from rqc.runtime.replace_file import Replacement, check_folder, explained
from rqc.runtime.tensors import locate_tensors
from rqc.runtime.zip_layout import GRAPH, MANIFEST, WEIGHTS, Entry

DEFAULT_NAME = b"engine.plan"
"""What graph.onnx calls the engine as it lies in the file: it must not depend on where that was written."""
_MAGIC = f'{{\n "format": "{FORMAT}",'.encode()
Append = Callable[[memoryview], None]


@dataclass(frozen=True)
class EngineSummary:
    """What was written: the file's size, the size of its weights.bin (both in bytes) and the file's sha256."""

    size_bytes: int
    weight_bytes: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Weights:
    """weights.bin to be: its size in bytes, and a function that gives its bytes, in order, to another."""

    size: int
    stream: Callable[[Append], None]


def write_parts(
    path: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    graph: bytes,
    weights: Weights,
    files: Mapping[str, bytes | memoryview],
) -> EngineSummary:
    """Write the parts of an engine at `path`, over an engine that is there.

    graph: the ONNX model, offsets of its external tensors counted from the start of weights.bin. files: other entries.
    The file depends on the parts alone, not on `path`. Raises EngineFormatError if `path` is something else than an
    engine or the parts make no sound engine, InputError if `path` cannot be written, ResourceError if the disk is full;
    then, as on any exception, nothing is left behind.
    """
    target = check_target(path)
    if reserved := set(files) & {MANIFEST, GRAPH, WEIGHTS}:
        raise EngineFormatError(f"{', '.join(sorted(reserved))} cannot be given as a file of an engine")
    contents: dict[str, bytes | memoryview] = {**files, GRAPH: graph}
    zip_layout.check_names([MANIFEST, WEIGHTS, *contents])
    entries = _lay_out(manifest, {name: len(data) for name, data in contents.items()} | {WEIGHTS: weights.size})
    place = next(entry for entry in entries if entry.name == WEIGHTS)
    bound = bind(graph, external_tensors(graph), DEFAULT_NAME, place.start)
    contents[GRAPH] = bound
    # what the reader refuses shows here, and not after the hours of folding
    locate_tensors(external_tensors(bound), place)
    size = entries[-1].end + len(zip_layout.tail_bytes(entries))
    with Replacement(target, size) as new:
        digest, crc = _stream(new, weights, place)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()} | {WEIGHTS: digest}
        contents[MANIFEST] = _manifest_text(manifest, entries, digests)
        crcs = {name: zlib.crc32(data) for name, data in contents.items()} | {WEIGHTS: crc}
        _write_around(new, [replace(entry, crc=crcs[entry.name]) for entry in entries], contents)
        EngineFile.open(new.temporary, check=True).close()
        sha256 = _sha256(new.temporary)
        _refuse_foreign(target)
        new.commit()
    return EngineSummary(size, weights.size, sha256)


def check_target(path: str | os.PathLike[str]) -> str:
    """The real path of an engine that is to be written at `path`, before anything has been computed for it.

    Raises InputError if none can lie there, EngineFormatError if something else does.
    """
    target = check_path(path)
    _refuse_foreign(target)
    check_folder(target)
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


def _stream(new: Replacement, weights: Weights, place: Entry) -> tuple[str, int]:
    """Write weights.bin piece by piece; return its (sha256, CRC-32)."""
    digest, crc, end = hashlib.sha256(), 0, 0

    def append(data: memoryview) -> None:
        nonlocal crc, end
        new.write(data, place.start + end)
        digest.update(data)
        crc = zlib.crc32(data, crc)
        end += len(data)

    weights.stream(append)
    if end != weights.size:
        raise EngineFormatError(f"{WEIGHTS} came as {end} bytes instead of {weights.size}")
    return digest.hexdigest(), crc


def _write_around(new: Replacement, entries: Sequence[Entry], contents: Mapping[str, bytes | memoryview]) -> None:
    """Write everything but the data of weights.bin."""
    for entry in entries:
        new.write(zip_layout.local_bytes(entry), entry.header)
        if entry.name != WEIGHTS:
            new.write(contents[entry.name], entry.start)
    new.write(zip_layout.tail_bytes(entries), entries[-1].end)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
