"""Data files read piece by piece: the records of a .jsonl or .json file with their places, the text of a .txt file.

A .jsonl file of any size takes the memory of its longest line, a .txt file that of a few pieces; a .json file is read
as a whole, for it is one value, but its records are parsed one after the other.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rqc.runtime.errors import InputError

SUFFIXES = (".jsonl", ".json", ".txt")
PIECE = 1 << 20
"""Characters of text after which a piece ends where it can: in front of a line that starts with no blank."""
_LONGEST = 4 * PIECE
_BLANKS = " \t\n\r"
_LIST = "a .json file is one list of records; with one record a line, name the file .jsonl"


def checked_suffix(path: Path) -> str:
    """The kind of a data file by its name. Raises InputError for a kind that is not read, or for no file at all."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        if path.is_dir() or not path.exists():  # whatever it is called
            list(_lines(path))
        kind = f"files that end in {path.suffix!r}" if path.suffix else "files without a suffix"
        raise InputError(f"{path}: {kind} are not read", hint=f"rename or convert it to {', '.join(SUFFIXES)}")
    return suffix


def json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of every record of a .jsonl or .json file; the place names file and line.

    Raises InputError for a file that cannot be read, is not UTF-8 or not JSON.
    """
    return _jsonl(path) if checked_suffix(path) == ".jsonl" else _json_list(path)


def text_pieces(path: Path) -> Iterator[str]:
    """The text of a .txt file in pieces of about `PIECE` characters. Raises InputError as `json_values` does."""
    held: list[str] = []
    size = 0
    for line in _text_lines(path):
        if (size >= PIECE and line[:1].strip()) or size >= _LONGEST:
            yield "".join(held)
            held, size = [], 0
        held.append(line)
        size += len(line)
    if held:
        yield "".join(held)


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, raw in enumerate(_lines(path), 1):
        place = f"{path}, line {number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            if line.strip():
                yield place, json.loads(line)
        except UnicodeDecodeError as error:
            raise _not_utf8(place) from error
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{place}: not JSON ({_reason(error)})", hint="write one complete JSON object on each line"
            ) from error


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    content = _whole(path)
    at = _skip(content, 0)
    if at == len(content):
        return
    if content[at] != "[":
        _refuse_no_list(path, content)
    decoder = json.JSONDecoder()
    at = counted = _skip(content, at + 1)
    line = 1 + content.count("\n", 0, at)
    while content[at : at + 1] != "]":
        line += content.count("\n", counted, at)
        counted = at
        try:
            value, at = decoder.raw_decode(content, at)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg})", hint=_LIST) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {line}: not JSON ({_reason(error)})", hint=_LIST) from error
        yield f"{path}, line {line}", value
        at = _after_record(path, content, at)
    if _skip(content, at + 1) != len(content):
        raise InputError(f"{path}, line {_line(content, at)}: more text after the list's end", hint=_LIST)


def _after_record(path: Path, content: str, at: int) -> int:
    """Where the next record or the list's end stands, behind a record that ends at `at`."""
    at = _skip(content, at)
    following = content[at : at + 1]
    if following == "]":
        return at
    if following != ",":
        missing = "the list has no end" if not following else "no comma between two records"
        raise InputError(f"{path}, line {_line(content, at)}: not JSON ({missing})", hint=_LIST)
    at = _skip(content, at + 1)
    if content[at : at + 1] == "]":
        raise InputError(f"{path}, line {_line(content, at)}: not JSON (a comma before the list's end)", hint=_LIST)
    return at


def _refuse_no_list(path: Path, content: str) -> None:
    """Raise InputError for a .json file that does not start with a list."""
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg})", hint=_LIST) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({_reason(error)})", hint=_LIST) from error
    kind = "one object" if isinstance(value, dict) else f"a {type(value).__name__}"
    raise InputError(f"{path}: {kind} where a list of records belongs", hint=_LIST)


def _whole(path: Path) -> str:
    raw = b"".join(_lines(path))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{path}, line {raw.count(10, 0, error.start) + 1}") from error


def _text_lines(path: Path) -> Iterator[str]:
    """Lines, the long ones in parts, with their ends as `\\n`."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    number = 1
    try:
        for raw in _lines(path, PIECE):
            yield decoder.decode(raw)
            number += raw.endswith(b"\n")
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{path}, line {number}") from error


def _lines(path: Path, limit: int = -1) -> Iterator[bytes]:
    """The lines of a file with their ends, those longer than `limit` bytes in parts."""
    try:
        with path.open("rb") as file:
            yield from iter(lambda: _read(file, limit), b"")
    except OSError as error:
        hint = "name a file in it" if path.is_dir() else "check the path of the data file"
        raise InputError(f"{path}: {error.strerror or error}", hint=hint) from error


def _read(file: BinaryIO, limit: int) -> bytes:
    return file.readline(limit)


def _skip(content: str, at: int) -> int:
    """The first position from `at` on that is not blank."""
    while at < len(content) and content[at] in _BLANKS:
        at += 1
    return at


def _line(content: str, at: int) -> int:
    return content.count("\n", 0, at) + 1


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _not_utf8(place: str) -> InputError:
    return InputError(f"{place}: not UTF-8", hint="convert the file to UTF-8")
