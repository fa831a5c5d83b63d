"""Text to calibrate on and to compare on: what ships, what a user names, and its cut into windows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from rqc.compiler.data_files import checked_suffix, json_values, text_pieces
from rqc.runtime.errors import CheckpointError, InputError

_FORMS = 'a record is a string, {"text": ...}, {"instruction": ..., "input": ..., "output": ...} or {"messages": [...]}'
Chat = Callable[[Sequence[Mapping[str, Any]], Any], str]
"""Messages, and the tools that they may call or None, to text."""


def calibration_text() -> str:
    """The public-domain prose that a compile calibrates on unless told otherwise (about 240 kB; data/README.md)."""
    return _shipped("calibration.txt")


def parity_text() -> str:
    """The public-domain prose that parity is measured on (about 60 kB), disjoint from `calibration_text`."""
    return _shipped("parity.txt")


def read_text(path: str | Path, chat: Chat | None = None) -> str:
    """The text of a .txt, .json or .jsonl file, its records separated by blank lines. chat: what renders those that
    are conversations, the model's chat template; without it they are refused.

    Raises InputError if the file is missing, of another kind, not UTF-8, without text, or if a record is malformed,
    naming its line.
    """
    path = Path(path)
    if checked_suffix(path) == ".txt":
        text = "".join(text_pieces(path))
    else:
        text = "\n\n".join(_record_text(value, place, chat) for place, value in json_values(path))
    if not text.strip():
        raise InputError(f"{path}: no text in the file", hint="name a file with some paragraphs of prose in it")
    return text


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer.json of a model directory, None where there is none. Raises CheckpointError if it is damaged."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path} is no tokenizer: {error}", hint="download it again") from error


def windows(ids: Sequence[int], length: int, count: int) -> list[list[int]]:
    """Cut token ids into at most `count` consecutive windows of `length`, without overlap.

    A text shorter than one window gives a single window of all of it; otherwise the tokens that do not fill a last
    window are left out, so all windows have one length. Raises InputError for a length or count below 1 or no ids.
    """
    if length < 1 or count < 1:
        raise InputError(
            f"{count} windows of {length} tokens: both must be at least 1", hint="ask for 1 or more of each"
        )
    if not ids:
        raise InputError("the text has no tokens to cut into windows", hint="name a longer text")
    length = min(length, len(ids))
    count = min(count, len(ids) // length)
    return [list(ids[start : start + length]) for start in range(0, count * length, length)]


def _shipped(name: str) -> str:
    return files("rqc.compiler").joinpath("data", name).read_text(encoding="utf-8")


def _record_text(record: Any, place: str, chat: Chat | None) -> str:
    """A record's text: itself, its messages as the model has them, its "text", or its instruction, input (which may be
    absent or empty) and output."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise InputError(f"{place}: a {type(record).__name__} where a record belongs", hint=_FORMS)
    if "messages" in record:
        return _conversation(record, place, chat)
    fields = ("text",) if "text" in record else ("instruction", "input", "output")
    for name in fields:
        if name not in record and name != "input":
            raise InputError(f'{place}: neither "text" nor "{name}" in the record', hint=_FORMS)
    parts = [record.get(name, "") for name in fields]
    if not all(isinstance(part, str) for part in parts):
        raise InputError(f"{place}: {', '.join(fields)} must be strings", hint=_FORMS)
    return "\n".join(part for part in parts if part)


def _conversation(record: Mapping[str, Any], place: str, chat: Chat | None) -> str:
    if chat is None:
        raise InputError(f'{place}: "messages" where there is no model to render them', hint='give {"text": ...}')
    try:
        return chat(record["messages"], record.get("tools"))
    except InputError as error:
        raise InputError(f"{place}: {error.message}", hint=error.hint) from error
