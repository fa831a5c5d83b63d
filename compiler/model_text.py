"""Text as a model reads it: records as a fine-tune has them, conversations by the model's chat template, on a day that
is always the same; tokens by its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from rqc.compiler.data_files import checked_suffix, json_values, text_pieces
from rqc.compiler.records import Instruction, Record, Text, record_of
from rqc.compiler.text import calibration_text
from rqc.compiler.tokenizer_files import SETTINGS, check_template, optional_object
from rqc.runtime.chat import ChatTemplate, load_chat_template, template_source
from rqc.runtime.errors import CheckpointError, InputError

TODAY = datetime(2024, 7, 26)
"""What templates that write the date into a prompt are given, so that a compile of another day gives the same bytes."""
PIECE = 1 << 18
"""Characters of records, at least, that are encoded at a time."""


def text_of(named: Path | None, directory: Path) -> str:
    """The text of a .txt, .json or .jsonl file, its records separated by blank lines, as the model of a directory has
    them, or the text that ships.

    Raises InputError if the file is missing, of another kind, not UTF-8, without text, or if a record is malformed,
    naming its line; CheckpointError for a damaged chat template.
    """
    text = "".join(pieces_of(named, directory))
    if not text.strip():
        raise InputError(f"{named}: no text in the file", hint="name a file with some paragraphs of prose in it")
    return text


def pieces_of(named: Path | None, directory: Path) -> Iterator[str]:
    """The same in pieces, read one after the other."""
    if named is None:
        yield calibration_text()
    elif checked_suffix(named) == ".txt":
        yield from text_pieces(named)
    else:
        yield from _joined(_records(named, _Templates(directory)))


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


class _Templates:
    """The chat templates of a model directory, read when there is something to render."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._read: dict[bool, ChatTemplate | None] = {}

    def of(self, *, tools: bool) -> ChatTemplate | None:
        """The one for conversations with tools or without. Raises CheckpointError for a damaged one."""
        if tools not in self._read:
            self._read[tools] = self._template(tools)
        return self._read[tools]

    def _template(self, tools: bool) -> ChatTemplate | None:
        check_template(self.directory)
        for name in SETTINGS[:2]:
            optional_object(self.directory / name)  # raises where it is damaged
        files = {name: (self.directory / name).read_bytes() for name in SETTINGS if (self.directory / name).is_file()}
        if not template_source(files, with_tools=tools):
            return None
        try:
            return load_chat_template(files, with_tools=tools, today=TODAY)
        except InputError as error:
            raise CheckpointError(f"{self.directory}: {error.message}", hint="correct its chat template") from error


def _records(path: Path, templates: _Templates) -> Iterator[str]:
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


def _rendered(record: Record, templates: _Templates) -> str:
    """What a model reads of a record: as the fine-tune has it, the answers included."""
    if isinstance(record, Text):
        return record.text
    tools: Any = None if isinstance(record, Instruction) else record.tools
    template = templates.of(tools=bool(tools))
    if template is not None:
        return template.render(record.messages, tools=tools, add_generation_prompt=False)
    if isinstance(record, Instruction):
        return record.prompt + record.output
    raise InputError("the model has no chat template for messages", hint=_WITHOUT)


_WITHOUT = 'put a chat_template.jinja into the model directory, or use {"instruction", "output"} records'


def _joined(texts: Iterable[str]) -> Iterator[str]:
    """Texts with blank lines between them, several at a time."""
    held: list[str] = []
    between = ""
    for text in texts:
        held.append(between + text)
        between = "\n\n"
        if sum(map(len, held)) >= PIECE:
            yield "".join(held)
            held = []
    yield "".join(held)
