"""The ZIP structures of an engine: every byte outside the entries' data follows from names, sizes, checksums, places.

Source: PKWARE APPNOTE.TXT 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (end
records) and 4.5.3 (ZIP64); the padding is the alignment field 0xD935 of Android's zipalign. The writer lays the bytes
down with these functions; the reader builds them again and compares: a damaged header cannot pass for another one.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rqc.runtime.errors import EngineFormatError

MANIFEST, GRAPH, WEIGHTS = "manifest.json", "graph.onnx", "weights.bin"
WEIGHTS_ALIGNMENT = 65536  # bytes: the largest page (aarch64) and the allocation granularity of other systems
ENTRY_ALIGNMENT = 4096  # bytes
ZIP64_LIMIT = 0xFFFFFFFF  # sizes and places from here on do not fit in the 32-bit fields
MAX_DIRECTORY = 1 << 20  # bytes
MAX_NAME = 200  # bytes
MAX_EXTRA = 0xFFFF  # bytes of a local header's extra fields, padding included

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
LOCAL_SIZE = _LOCAL.size
MIN_PADDING = 6  # bytes: identifier, length, alignment
_SATURATED = 0xFFFFFFFF
_DATE = (1 << 5) | 1  # 1980-01-01, the first day a ZIP can name: the file must not depend on when it was written
_MADE_BY = (3 << 8) | 45  # Unix, specification 4.5
_ATTRIBUTES = 0o100644 << 16  # a regular file, readable by all
_NAME = re.compile(r"[A-Za-z0-9_+@=, .\-]+(?:/[A-Za-z0-9_+@=, .\-]+)*")
_HINT = "copy or compile the engine again"

Read = Callable[[int, int], bytes]  # (place, length) -> exactly that many bytes of the file


@dataclass(frozen=True)
class Entry:
    """A stored file of the ZIP: its local header begins at byte `header`, its `size` bytes of data at byte `start`."""

    name: str
    size: int
    crc: int
    header: int
    start: int

    @property
    def end(self) -> int:
        """The byte after the data."""
        return self.start + self.size


def alignment(name: str) -> int:
    """Bytes that the data of the entry `name` is aligned to."""
    return WEIGHTS_ALIGNMENT if name == WEIGHTS else ENTRY_ALIGNMENT


def order(names: Sequence[str]) -> list[str]:
    """The names in the order an engine holds them: manifest, graph, weights, then the others sorted."""
    fixed = [MANIFEST, GRAPH, WEIGHTS]
    return fixed + sorted(set(names) - set(fixed))


def check_names(names: Sequence[str]) -> None:
    """Raise EngineFormatError for a name that could leave a folder, or two names that collide there when extracted."""
    seen: set[str] = set()
    for name in names:
        parts = name.split("/")
        if len(name) > MAX_NAME or not _NAME.fullmatch(name) or any(part.strip(" .") == "" for part in parts):
            raise EngineFormatError(f"entry name {name[:80]!r} is not a plain relative path", hint=_HINT)
        if name.casefold() in seen:
            raise EngineFormatError(f"entry name {name!r} occurs twice", hint=_HINT)
        seen.add(name.casefold())
    for name in names:
        parts = name.casefold().split("/")
        if any("/".join(parts[:depth]) in seen for depth in range(1, len(parts))):
            raise EngineFormatError(f"entry name {name!r} has another entry as its folder", hint=_HINT)


def local_zip64(size: int) -> bytes:
    """The ZIP64 field of a local header: both sizes, or nothing when they fit in 32 bits."""
    return struct.pack("<2H2Q", 1, 16, size, size) if size >= ZIP64_LIMIT else b""


def _clip(value: int) -> int:
    return _SATURATED if value >= ZIP64_LIMIT else value


def _version(entry: Entry) -> int:
    return 45 if entry.size >= ZIP64_LIMIT or entry.header >= ZIP64_LIMIT else 20


def local_bytes(entry: Entry) -> bytes:
    """Everything from the entry's local header to its data: entry.start - entry.header bytes.

    Raises ValueError when the padding field cannot have the length that these places ask for.
    """
    name, large = entry.name.encode(), local_zip64(entry.size)
    room = entry.start - entry.header - LOCAL_SIZE - len(name)
    padding = room - len(large)
    if padding < MIN_PADDING or room > MAX_EXTRA:
        raise ValueError(f"{entry.name}: a padding of {padding} bytes")
    # 65,536 does not fit in the field's 16 bits and becomes 0; readers of ZIP files skip the field whatever it holds
    pad = struct.pack("<3H", 0xD935, padding - 4, alignment(entry.name) & 0xFFFF) + bytes(padding - MIN_PADDING)
    size = _clip(entry.size)
    head = _LOCAL.pack(b"PK\3\4", _version(entry), 0, 0, 0, _DATE, entry.crc, size, size, len(name), room)
    return head + name + large + pad


def _central_bytes(entry: Entry) -> bytes:
    name = entry.name.encode()
    large = [entry.size] * 2 if entry.size >= ZIP64_LIMIT else []
    if entry.header >= ZIP64_LIMIT:
        large.append(entry.header)
    extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    size = _clip(entry.size)
    sizes = (entry.crc, size, size, len(name), len(extra))
    head = _CENTRAL.pack(
        b"PK\1\2", _MADE_BY, _version(entry), 0, 0, 0, _DATE, *sizes, 0, 0, 0, _ATTRIBUTES, _clip(entry.header)
    )
    return head + name + extra


def tail_bytes(entries: Sequence[Entry]) -> bytes:
    """Everything after the last entry's data: central directory and end records (ZIP64 ones if a number needs them)."""
    start = entries[-1].end
    directory = b"".join(map(_central_bytes, entries))
    count, size = len(entries), len(directory)
    large = b""
    if start >= ZIP64_LIMIT or size >= ZIP64_LIMIT:
        large = _END64.pack(b"PK\6\6", _END64.size - 12, _MADE_BY, 45, 0, 0, count, count, size, start)
        large += _LOCATOR64.pack(b"PK\6\7", 0, start + size, 1)
    return directory + large + _END.pack(b"PK\5\6", 0, 0, count, count, _clip(size), _clip(start), 0)


def _damaged(what: str) -> EngineFormatError:
    return EngineFormatError(what, hint=_HINT)


def read_directory(read: Read, size: int) -> list[Entry]:
    """The entries of the ZIP file of `size` bytes, in the order of the file, each lying right behind the one before.

    Raises EngineFormatError for anything but a file of stored, named, adjoining entries that begins with the first
    header and ends with the end record. `verify_structure` then compares what is not looked at here.
    """
    start, length, count, end = _read_end(read, size)
    if length > MAX_DIRECTORY:
        raise _damaged(f"its directory claims {length} bytes")
    if start + length != end:
        raise _damaged("its directory does not lie right before the end record")
    directory = read(start, length)
    entries: list[Entry] = []
    at = 0
    for _ in range(count):
        name, crc, data_size, header, at = _read_central(directory, at)
        entries.append(Entry(name, data_size, crc, header, 0))
    check_names([entry.name for entry in entries])
    return _locate(read, entries, start)


def _read_end(read: Read, size: int) -> tuple[int, int, int, int]:
    """(start of the directory, its length, number of entries, start of the end records)."""
    if size < _END.size:
        raise _damaged(f"it ends after {size} bytes")
    end = size - _END.size
    signature, _, _, _, count, length, start, _ = _END.unpack(read(end, _END.size))
    if signature != b"PK\5\6":
        raise _damaged("it does not end with a ZIP end record: it was cut off, or something was added to it")
    if _SATURATED not in (length, start):
        return start, length, count, end
    locator = end - _LOCATOR64.size
    end = locator - _END64.size
    if end < 0:
        raise _damaged("its ZIP64 end record is missing")
    if read(locator, 4) != b"PK\6\7" or read(end, 4) != b"PK\6\6":
        raise _damaged("its ZIP64 end record is missing")
    _, _, _, _, _, _, _, count, length, start = _END64.unpack(read(end, _END64.size))
    return start, length, count, end


def _read_central(directory: bytes, at: int) -> tuple[str, int, int, int, int]:
    """(name, crc, size, place of the local header, place of the next record) of the record at directory[at]."""
    if at + _CENTRAL.size > len(directory):
        raise _damaged("its directory ends in the middle of an entry")
    fields = _CENTRAL.unpack_from(directory, at)
    signature, flags, method, crc, packed, size, name_size, extra_size = (fields[i] for i in (0, 3, 4, 7, 8, 9, 10, 11))
    header, comment_size = fields[16], fields[12]
    names = at + _CENTRAL.size
    extras = names + name_size
    after = extras + extra_size
    if signature != b"PK\1\2" or comment_size or after > len(directory):
        raise _damaged("its directory is damaged")
    raw = directory[names:extras]
    name = raw.decode("ascii", "backslashreplace")
    if flags & 1:
        raise _damaged(f"entry {name!r} is encrypted")
    if method:
        raise _damaged(f"entry {name!r} is compressed; an engine's entries are stored")
    large = _read_zip64(directory[extras:after], [packed, size, header])
    # the ZIP64 field lists the uncompressed size, the compressed size and the place, each only where 32 bits are full
    size, packed, header = (large.pop(0) if value == _SATURATED else value for value in (size, packed, header))
    if size != packed:
        raise _damaged(f"entry {name!r} is stored with two different sizes")
    return name, crc, size, header, after


def _read_zip64(extra: bytes, values: Sequence[int]) -> list[int]:
    count = sum(value == _SATURATED for value in values)
    if not count:
        return []
    if len(extra) != 4 + 8 * count or struct.unpack_from("<2H", extra) != (1, 8 * count):
        raise _damaged("its directory has a damaged ZIP64 field")
    return list(struct.unpack_from(f"<{count}Q", extra, 4))


def _locate(read: Read, entries: Sequence[Entry], directory: int) -> list[Entry]:
    """The entries with the place of their data, one behind the other, all before the byte `directory`."""
    located: list[Entry] = []
    at = 0
    for entry in entries:
        if entry.header != at or at + LOCAL_SIZE > directory:
            raise _damaged(f"entry {entry.name!r} begins at byte {entry.header} instead of {at}")
        fields = _LOCAL.unpack(read(at, LOCAL_SIZE))
        start = at + LOCAL_SIZE + fields[9] + fields[10]
        if fields[0] != b"PK\3\4" or start + entry.size > directory:
            raise _damaged(f"entry {entry.name!r} has no header at byte {at}, or does not fit in the file")
        located.append(Entry(entry.name, entry.size, entry.crc, at, start))
        at = start + entry.size
    return located


def verify_structure(read: Read, entries: Sequence[Entry], size: int) -> None:
    """Raise EngineFormatError unless every byte outside the entries' data is the one that these entries ask for."""
    for entry in entries:
        if entry.start % alignment(entry.name):
            raise _damaged(f"entry {entry.name!r} at byte {entry.start} is not aligned")
        try:
            expected = local_bytes(entry)
        except ValueError as error:
            raise _damaged(f"entry {entry.name!r} has a wrong header") from error
        if read(entry.header, len(expected)) != expected:
            raise _damaged(f"the header of entry {entry.name!r} at byte {entry.header} is damaged")
    tail, end = tail_bytes(entries), entries[-1].end
    if size - end != len(tail) or read(end, len(tail)) != tail:
        raise _damaged(f"the ZIP directory at byte {end} is damaged")
