"""Text as a model reads it: conversations by its chat template, on a day that is always the same; tokens by its
tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from rqc.compiler.text import Chat, calibration_text, read_text
from rqc.compiler.tokenizer_files import SETTINGS, check_template
from rqc.runtime.chat import ChatTemplate, Message, load_chat_template, template_source
from rqc.runtime.errors import CheckpointError, InputError

TODAY = datetime(2024, 7, 26)
"""What templates that write the date into a prompt are given, so that a compile of another day gives the same bytes."""

_WITHOUT = 'put a chat_template.jinja into the model directory, or use {"instruction", "output"} records'


def chat_of(directory: Path) -> Chat:
    """How the model of a directory has conversations; its template is read when there is one to render.

    What is returned raises InputError for messages that are none, and without a template; CheckpointError for a damaged
    one.
    """

    @lru_cache
    def template(with_tools: bool) -> ChatTemplate:
        check_template(directory)
        files = {name: (directory / name).read_bytes() for name in SETTINGS if (directory / name).is_file()}
        if not template_source(files):
            raise InputError("the model has no chat template for messages", hint=_WITHOUT)
        return load_chat_template(files, with_tools=with_tools, today=TODAY)

    def render(messages: Sequence[Message], tools: Any) -> str:
        return template(bool(tools)).render(messages, tools=tools, add_generation_prompt=False)

    return render


def text_of(named: Path | None, directory: Path) -> str:
    """The text that is named, its conversations as the model of a directory has them, or the one that ships."""
    return calibration_text() if named is None else read_text(named, chat_of(directory))


def encoded(tokenizer: Tokenizer, text: str, directory: Path, vocabulary: int) -> list[int]:
    """The token ids of a text. Raises CheckpointError for a tokenizer of another model."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    if max(ids, default=0) >= vocabulary:
        raise CheckpointError(
            f"{directory}: tokenizer.json gives token {max(ids)}, the vocabulary has {vocabulary}",
            hint="tokenizer and weights are of different models; download both again",
        )
    return ids
