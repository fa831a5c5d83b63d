"""What one record of a data file says: a text, an instruction with its answer, or a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rqc.compiler.data_files import json_values
from rqc.runtime.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")
ANSWERS = "assistant"
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The prompt of Stanford Alpaca, with the answer on a line of its own as alpaca-lora and LLM-Adapters have it."""
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_FORMS = 'a record is {"text"}, {"instruction", "input", "output"} or {"messages"}'
_MESSAGE = 'a message is {"role": "user", "content": "Hi"}'
_EMPTY = "remove the record, or give it an answer"


@dataclass(frozen=True)
class Text:
    """A text to be learned as a whole. `place` names file and line, here and below."""

    place: str
    text: str


@dataclass(frozen=True)
class Instruction:
    """A task, what it is to be done with (may be empty), and the answer to be learned."""

    place: str
    instruction: str
    input: str
    output: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The same as a conversation: the instruction and, behind a blank line, the input; and the answer."""
        asked = "\n\n".join(part for part in (self.instruction, self.input) if part)
        return [{"role": "user", "content": asked}, {"role": ANSWERS, "content": self.output}]

    @property
    def prompt(self) -> str:
        """The task for a model without a chat template."""
        return (ALPACA_INPUT if self.input else ALPACA).format(instruction=self.instruction, input=self.input)


@dataclass(frozen=True)
class Conversation:
    """Messages of which every one by the assistant is to be learned, and the tools that the assistant has."""

    place: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


Record = Text | Instruction | Conversation


def read_records(path: Path) -> Iterator[Record]:
    """The records of a .jsonl or .json file, one after the other.

    Raises InputError, naming file and line, for what is not JSON or no record.
    """
    return (record_of(place, value) for place, value in json_values(path))


def record_of(place: str, value: Any) -> Record:
    """The record that a JSON value is. Of several forms in one value, that with an answer counts.

    Raises InputError for one of no known form, wrong types, an unknown role, nothing to be learned.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{place}: a {_kind(value)} where a record belongs", hint=_FORMS)
    if "messages" in value:
        return _conversation(place, value)
    if "instruction" in value and ("output" in value or "text" not in value):
        return _instruction(place, value)
    if "text" in value:
        return Text(place, _filled(place, value, "text", "remove the record"))
    keys = ", ".join(f'"{str(key)[:40]}"' for key in list(value)[:8]) or "nothing"
    raise InputError(f"{place}: a record of {keys} has no known form", hint=_FORMS)


def _instruction(place: str, value: Mapping[str, Any]) -> Instruction:
    if "output" not in value:
        raise InputError(f'{place}: an "instruction" without an "output"', hint=_FORMS)
    asked = _string(place, value, "instruction")
    given = _string(place, value, "input") if value.get("input") is not None else ""
    if not asked.strip() and not given.strip():
        raise InputError(f'{place}: "instruction" is empty', hint="remove the record, or say in it what is to be done")
    return Instruction(place, asked, given, _filled(place, value, "output", _EMPTY))


def _conversation(place: str, value: Mapping[str, Any]) -> Conversation:
    messages, tools = value["messages"], value.get("tools")
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{place}: "messages" is no list of messages', hint=_MESSAGE)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f'{place}: "tools" is no list of objects', hint="give the tools as the chat template has them")
    for number, message in enumerate(messages, 1):
        _check_message(f"{place}, message {number}", message)
    roles = [message["role"] for message in messages]
    if ANSWERS not in roles:
        raise InputError(f"{place}: no message of the assistant, so no answer to learn", hint=_EMPTY)
    if roles[0] == ANSWERS:
        raise InputError(
            f"{place}: the conversation starts with the assistant, whom nothing was asked",
            hint="put a system or user message in front, or remove the first message",
        )
    return Conversation(place, messages, tools or None)


def _check_message(place: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise InputError(f"{place}: a {_kind(message)} where a message belongs", hint=_MESSAGE)
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    if role not in ROLES:
        raise InputError(f"{place}: unknown role {str(role)[:40]!r}", hint=f"roles are {', '.join(ROLES)}")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise InputError(f'{place}: "tool_calls" is no list of objects', hint=_MESSAGE)
    if content is None and calls:
        return
    if not isinstance(content, str):
        raise InputError(f'{place}: "content" is a {_kind(content)}, not a string', hint=_MESSAGE)
    if role == ANSWERS and not content.strip() and not calls:
        raise InputError(f"{place}: the assistant's answer is empty", hint=_EMPTY)


def _filled(place: str, value: Mapping[str, Any], name: str, hint: str) -> str:
    text = _string(place, value, name)
    if not text.strip():
        raise InputError(f'{place}: "{name}" is empty', hint=hint)
    return text


def _string(place: str, value: Mapping[str, Any], name: str) -> str:
    text = value[name]
    if not isinstance(text, str):
        raise InputError(f'{place}: "{name}" is a {_kind(text)}, not a string', hint=_FORMS)
    return text


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "truth value", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
