"""The tokenizer and chat template of a model directory, exactly as its engine will apply them.

An engine carries tokenizer.json and the template beside it and applies them with runtime/text.py and runtime/chat.py.
The same code runs here on the same files: what is trained is what will be run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer

from rqc.compiler.chat_templates import ChatTemplates
from rqc.compiler.importer import full_config
from rqc.compiler.text import read_tokenizer
from rqc.compiler.tokenizer_files import converted_tokenizer, optional_object, special_ids
from rqc.models.checkpoint import model_directory
from rqc.runtime.chat import checked_messages, special_tokens
from rqc.runtime.errors import CheckpointError, InputError
from rqc.runtime.text import TextCodec

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
Span = tuple[int, int]
Message = Mapping[str, Any]


@dataclass(eq=False)
class TrainingTokenizer:
    """Text and conversations to token ids.

    end_id: the token that ends a text, None if the model has none. stop_ids: tokens at which the engine stops.
    pad_id: any token of the vocabulary, for padded positions count nowhere. config: of the model directory. templates:
    of one day, which some write into a prompt (Llama 3.2's does), so that a run of two days has one.
    """

    tokenizer: Tokenizer
    codec: TextCodec
    end_id: int | None
    stop_ids: frozenset[int]
    pad_id: int
    config: dict[str, Any] = field(repr=False)
    templates: ChatTemplates = field(repr=False)

    @property
    def has_chat(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self.templates.source())

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text. special: with what the engine puts around a prompt (bos)."""
        return self.codec.encode(text, special=special)

    def offsets(self, text: str) -> list[Span]:
        """Where in the text the tokens of encode(text, special=False) stand, in characters."""
        found: list[Span] = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special ones included."""
        return self.codec.decode(ids, skip_special=False)

    def chat_text(self, messages: Sequence[Message], tools: Any, *, prompt: bool) -> str:
        """A conversation as the engine's chat renders it; prompt: up to where the assistant is to answer.

        Raises InputError if there is no template or it refuses the messages.
        """
        return self.templates.render(messages, tools, prompt=prompt)

    def marks_answers(self, tools: Any) -> bool:
        """Whether the template says by `{% generation %}` what the assistant writes."""
        return _MARK.search(self.templates.source(tools)) is not None

    def marked_spans(self, messages: Sequence[Message], tools: Any) -> list[Span]:
        """What the template marks in chat_text(messages, prompt=False), as ranges of characters.

        transformers finds them; its rendering must be ours. Raises InputError if it is not.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        with _dated(self.templates.today):
            texts, spans = render_jinja_template(
                conversations=[checked_messages(messages)],
                tools=tools,
                chat_template=self.templates.source(tools),
                return_assistant_tokens_mask=True,
                **special_tokens(self.config),
            )
        if texts[0] != self.chat_text(messages, tools, prompt=False):
            raise InputError(
                "transformers renders the chat template otherwise than the engine does",
                hint="take the {% generation %} marks out of the template",
            )
        return [(start, end) for start, end in spans[0] if start < end]


def read_training_tokenizer(model: str | Path, today: datetime | None = None) -> TrainingTokenizer:
    """The tokenizer of a model directory or GGUF file, for records of that day.

    Raises CheckpointError where there is none or where it is damaged, InputError for a chat template that is none.
    """
    directory = model_directory(model)
    tokenizer = read_tokenizer(directory) or converted_tokenizer(directory)
    if tokenizer is None:
        raise CheckpointError(
            f"{directory} has no tokenizer, and training data is text",
            hint="put the model's tokenizer.json into the directory",
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    templates = ChatTemplates.of(directory, today)
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second wins, as in the runtime
        config |= optional_object(directory / name)
    full = full_config(directory).to_dict()
    ids = special_ids(directory, full)
    stops = ids["eos_token_ids"]
    codec = TextCodec(tokenizer.to_str().encode(), bos_token_id=ids["bos_token_id"] if ids["add_bos"] else None)
    end = _end_id(tokenizer, config, stops)
    ends = [] if end is None else [end]
    pad = _pad_id([ids["pad_token_id"], *ends], full.get("vocab_size"))
    found = TrainingTokenizer(tokenizer, codec, end, frozenset(stops or ends), pad, config, templates)
    templates.check()
    return found


@contextmanager
def _dated(today: datetime | None) -> Iterator[None]:
    """Tell transformers' templates that it is `today`; it lets nobody pass them another clock."""
    from transformers.utils import chat_template_utils

    plain = chat_template_utils.datetime
    if today is not None:
        chat_template_utils.datetime = SimpleNamespace(now=lambda: today)
    try:
        yield
    finally:
        chat_template_utils.datetime = plain


def _end_id(tokenizer: Tokenizer, config: Mapping[str, Any], stops: Sequence[int]) -> int | None:
    """The tokenizer's end of text, unless the engine would run past it: then the first id at which it stops."""
    named: int | None = tokenizer.token_to_id(special_tokens(config).get("eos_token", ""))
    return named if named is not None and (named in stops or not stops) else next(iter(stops), None)


def _pad_id(wanted: Sequence[int | None], vocab_size: Any) -> int:
    """The first of these that the embedding has (a GGUF's padding token may lie outside of it), else 0."""
    size = vocab_size if isinstance(vocab_size, int) else 0
    return next((token for token in wanted if token is not None and 0 <= token < size), 0)
