"""The model's chat template: messages to the prompt text that the model was trained on.

Rendered the way transformers does (utils/chat_template_utils.py): jinja2's immutable sandbox, trimmed blocks,
loop controls, `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and the `generation` block tag.
Templates come with models, that is from strangers: the sandbox sees plain JSON data only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rqc.runtime.errors import EngineFormatError, InputError

Message = Mapping[str, Any]
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which APIs pass a message's reasoning


class ChatTemplate:
    """A compiled chat template with the special tokens that it may name."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str] | None = None, today: datetime | None = None
    ) -> None:
        """today: the time that the template is told, that of each rendering if None. Raises InputError if the template
        is not valid jinja2."""
        self._special = dict(special_tokens or {})
        self._clock = {} if today is None else {"strftime_now": today.strftime}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise InputError(f"the model's chat template cannot be read: {error}", hint=_WITHOUT) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation. variables: what else a template reads, such as enable_thinking=False.

        Raises InputError for malformed messages and for what the template itself refuses.
        """
        given = {"messages": checked_messages(messages), "add_generation_prompt": add_generation_prompt}
        data = {**self._special, "documents": None, **self._clock, **_plain({"tools": tools, **variables}), **given}
        try:
            return self._template.render(data)
        except Exception as error:  # the template is the model's code: whatever it raises is its refusal
            raise InputError(f"the model's chat template refuses these messages: {error}", hint=_ROLES) from error


_WITHOUT = "use generate or stream with a prompt in the model's own format"
_ROLES = "most templates want an optional system message, then user and assistant in turn"


def load_chat_template(
    files: Mapping[str, bytes], *, with_tools: bool = False, today: datetime | None = None
) -> ChatTemplate:
    """The template among an engine's files, ready to render. today: see `ChatTemplate`. Raises InputError without
    one."""
    source = template_source(files, with_tools=with_tools)
    if not source:
        raise InputError("this model has no chat template", hint=_WITHOUT)
    tokens = {**_json(files, "special_tokens_map.json"), **_json(files, "tokenizer_config.json")}
    return ChatTemplate(source, special_tokens(tokens), today)


def template_source(files: Mapping[str, bytes], *, with_tools: bool = False) -> str:
    """The text of the template: chat_template.jinja, else tokenizer_config.json's; "" without one.

    Of several named templates "default" is taken, "tool_use" when there are tools.
    """
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8")
    source = _json(files, "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):
        entries = (entry for entry in source if isinstance(entry, Mapping))
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        source = named.get("tool_use" if with_tools else "default", named.get("default"))
    return source if isinstance(source, str) else ""


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Every `…_token` of a tokenizer configuration as text (bos_token, eos_token, …)."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            value = value.get("content")
        if name.endswith("_token") and isinstance(value, str):
            found[name] = value
    return found


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as plain JSON data, without fields that are None. Raises InputError if they are no conversation."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or len(messages) == 0:
        raise InputError("a chat is a list of messages", hint='for example [{"role": "user", "content": "Hi"}]')
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {place} has no role", hint='a message is {"role": "user", "content": "Hi"}')
        if "content" not in message and "tool_calls" not in message:
            raise InputError(f"message {place} has no content", hint='a message is {"role": "user", "content": "Hi"}')
    plain: list[dict[str, Any]] = _plain(list(messages))
    return [_with_reasoning({key: value for key, value in message.items() if value is not None}) for message in plain]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The reasoning of a message under each name that templates read it by."""
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """The value rebuilt from JSON types: nothing with methods of its own reaches the sandbox."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages and template variables are plain JSON data: {error}") from error


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except ValueError as error:
        raise EngineFormatError(f"the engine's {name} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's part for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # templates may pass it by this name
    return datetime.now().strftime(format)
