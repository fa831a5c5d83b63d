"""The chat templates of a model directory, rendered as its engine will: for training and for calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rqc.compiler.tokenizer_files import SETTINGS, check_template, optional_object
from rqc.runtime.chat import ChatTemplate, Message, load_chat_template, template_source
from rqc.runtime.errors import InputError

_ABSENT = 'put a chat_template.jinja into the model directory, or use {"instruction", "output"} records'


class ChatTemplates:
    """One for conversations with tools, one for those without; each is compiled when there is something to render.

    files: of a model directory, by name. today: the time that templates are told, that of each rendering if None.
    """

    def __init__(self, files: Mapping[str, bytes], today: datetime | None = None) -> None:
        self.files, self.today = files, today
        self._compiled: dict[bool, ChatTemplate] = {}

    @classmethod
    def of(cls, directory: Path, today: datetime | None = None) -> ChatTemplates:
        """Those of a model directory. Raises CheckpointError for a file that is damaged."""
        check_template(directory)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            optional_object(directory / name)
        return cls({name: (directory / name).read_bytes() for name in SETTINGS if (directory / name).is_file()}, today)

    def source(self, tools: Any = None) -> str:
        """The text of the one for conversations with these tools; "" where there is none."""
        return template_source(self.files, with_tools=bool(tools))

    def render(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> str:
        """A conversation as the engine's chat renders it; prompt: up to where the assistant is to answer.

        Raises InputError if there is no template, if it cannot be read, or refuses the messages.
        """
        return self._template(bool(tools)).render(messages, tools=tools, add_generation_prompt=prompt)

    def check(self) -> None:
        """Raise InputError for a template that cannot be read."""
        if self.source():
            self._template(tools=False)

    def _template(self, tools: bool) -> ChatTemplate:
        if not self.source(tools):
            raise InputError("the model has no chat template for messages", hint=_ABSENT)
        if tools not in self._compiled:
            self._compiled[tools] = load_chat_template(self.files, with_tools=tools, today=self.today)
        return self._compiled[tools]
