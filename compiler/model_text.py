"""Text as a model reads it: records as a fine-tune has them, conversations by the model's chat template, on a day that
is always the same; tokens by its tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

from tokenizers import Tokenizer

from rqc.compiler.chat_templates import ChatTemplates
from rqc.compiler.data_files import checked_suffix, json_values, text_pieces
from rqc.compiler.records import Instruction, Record, Text, record_of
from rqc.compiler.text import calibration_text
from rqc.runtime.errors import CheckpointError, InputError

TODAY = datetime(2024, 7, 26)
"""What templates that write the date into a prompt are given, so that a compile of another day gives the same bytes."""
PIECE = 1 << 18
"""Characters of records, at least, that are encoded at a time."""


def text_of(named: Path | None, directory: Path) -> str:
    """The text of a .txt, .json or .jsonl file, its records separated by blank lines, as the model of a directory has
    them, or the text that ships.

    Raises InputError if the file is missing, of another kind, not UTF-8, without text, or if a record is malformed,
    naming its line; CheckpointError for damaged files of its chat template.
    """
    return "".join(pieces_of(named, directory))


def hash_of(named: Path | None, directory: Path) -> str:
    """sha256 of the same, in UTF-8, of which a piece at a time is in memory. Raises as `text_of`."""
    digest = hashlib.sha256()
    for piece in pieces_of(named, directory):
        digest.update(piece.encode())
    return digest.hexdigest()


def pieces_of(named: Path | None, directory: Path) -> Iterator[str]:
    """The same in pieces, read one after the other; that there was no text is found at the end."""
    empty = True
    for piece in _pieces(named, directory):
        empty = empty and not piece.strip()
        yield piece
    if empty:
        raise InputError(f"{named}: no text in the file", hint="name a file with some paragraphs of prose in it")


def _pieces(named: Path | None, directory: Path) -> Iterator[str]:
    if named is None:
        yield calibration_text()
    elif checked_suffix(named) == ".txt":
        yield from text_pieces(named)
    else:
        yield from _joined(_records(named, ChatTemplates.of(directory, TODAY)))


def encoded(
    tokenizer: Tokenizer, pieces: Iterable[str], directory: Path, vocabulary: int, enough: int | None = None
) -> list[int]:
    """The token ids of a text in pieces, of which no more are looked at than give `enough`.

    Raises CheckpointError for a tokenizer of another model.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer.encode(piece, add_special_tokens=False).ids
        if enough is not None and len(ids) >= enough:
            break
    if max(ids, default=0) >= vocabulary:
        raise CheckpointError(
            f"{directory}: tokenizer.json gives token {max(ids)}, the vocabulary has {vocabulary}",
            hint="tokenizer and weights are of different models; download both again",
        )
    return ids


def _records(path: Path, templates: ChatTemplates) -> Iterator[str]:
    for place, value in json_values(path):
        record = Text(place, value) if isinstance(value, str) else record_of(place, value)
        try:
            text = _rendered(record, templates)
            text.encode()
        except InputError as error:
            raise InputError(f"{place}: {error.message}", hint=error.hint) from error
        except UnicodeEncodeError as error:
            raise InputError(f"{place}: the text is not valid Unicode", hint="remove its lone surrogates") from error
        yield text


def _rendered(record: Record, templates: ChatTemplates) -> str:
    """What a model reads of a record: as the fine-tune has it, the answers included."""
    if isinstance(record, Text):
        return record.text
    if isinstance(record, Instruction) and not templates.source():
        return record.prompt + record.output
    return templates.render(record.messages, None if isinstance(record, Instruction) else record.tools)


def _joined(texts: Iterable[str]) -> Iterator[str]:
    """Texts with blank lines between them, several at a time."""
    parts: list[str] = []
    size = 0
    for number, text in enumerate(texts):
        parts.append(f"\n\n{text}" if number else text)
        size += len(text)
        if size >= PIECE:
            yield "".join(parts)
            parts, size = [], 0
    yield "".join(parts)
