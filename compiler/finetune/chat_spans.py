"""Records as token ids, and which of them are the answer: where the runtime's prompt ends, the answer begins.

For every message of the assistant the prompt is what `Engine.chat` would feed at that point, rendered and encoded by
the same code; the answer is what the template adds for the message, up to the token at which the engine stops. One
example serves several answers where their ids agree. Where a template renders a message otherwise once others follow
(Qwen3 drops earlier reasoning), a conversation becomes several examples, each behind the prompt that is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rqc.compiler.finetune.tokenizer import Message, Span, TrainingTokenizer
from rqc.compiler.records import ANSWERS, Conversation, Instruction, Record, Text
from rqc.runtime.errors import InputError, RqcError


@dataclass(frozen=True)
class Tokenized:
    """Token ids of one example, and the ranges [start, stop) of those to be learned.

    unended: how many answers were found to end without a token at which the engine stops.
    """

    ids: list[int]
    answers: tuple[Span, ...]
    unended: int = 0


def tokenized(record: Record, tokenizer: TrainingTokenizer) -> list[Tokenized]:
    """The examples of one record. Raises InputError, with the record's place, if it cannot be encoded as it is run."""
    try:
        if isinstance(record, Text):
            return [whole_text(tokenizer.encode(record.text, special=True), tokenizer.end_id)]
        if isinstance(record, Conversation):
            return conversation(tokenizer, record.messages, record.tools)
        if tokenizer.has_chat:
            return conversation(tokenizer, record.messages, None)
        return [_alpaca(tokenizer, record)]
    except RqcError as error:
        raise InputError(f"{record.place}: {error.message}", hint=error.hint) from error


def whole_text(ids: list[int], end: int | None) -> Tokenized:
    """A text to be learned from its first token to its end."""
    ids = ids if end is None or ids[-1:] == [end] else [*ids, end]
    return Tokenized(ids, ((0, len(ids)),))


def conversation(
    tokenizer: TrainingTokenizer, messages: Sequence[Message], tools: list[dict[str, Any]] | None
) -> list[Tokenized]:
    """The examples of a conversation: together they hold every answer once, behind the ids that the engine is fed.

    Raises InputError if the template refuses the messages or its prompt is no beginning of what it renders.
    """
    examples: list[Tokenized] = []
    for place in reversed([place for place, message in enumerate(messages) if message["role"] == ANSWERS]):
        turn = _turn(tokenizer, messages[: place + 1], tools)
        if turn is None:
            return [_as_marked(tokenizer, messages, tools)]
        later = examples[-1] if examples else None
        if later is not None and later.ids[: len(turn.ids)] == turn.ids:
            answers = (*turn.answers, *later.answers)
            examples[-1] = Tokenized(later.ids, answers, turn.unended + later.unended)
        else:
            examples.append(turn)
    return examples[::-1]


def _turn(tokenizer: TrainingTokenizer, messages: Sequence[Message], tools: Any) -> Tokenized | None:
    """The last message as an answer to those before; None if only the template's own marks can tell it."""
    prompt = tokenizer.chat_text(messages[:-1], tools, prompt=True)
    text = tokenizer.chat_text(messages, tools, prompt=False)
    marked = tokenizer.marks_answers(tools)
    if not text.startswith(prompt):
        if marked:
            return None
        raise InputError(
            f"the chat template renders message {len(messages)} otherwise than its own generation prompt begins it",
            hint='put {% generation %} marks around the answer in the template, or use {"text"} records',
        )
    first, ids, parts = _continued(tokenizer, prompt, text, special=False)
    if not marked:
        return _ended(tokenizer, ids, [(first, len(ids))])
    spans = tokenizer.marked_spans(messages, tools)
    return _ended(tokenizer, ids, list(_ranges(_offsets(tokenizer, parts), spans, first)))


def _as_marked(tokenizer: TrainingTokenizer, messages: Sequence[Message], tools: Any) -> Tokenized:
    """A whole conversation with the answers that the template marks."""
    text = tokenizer.chat_text(messages, tools, prompt=False)
    spans = tokenizer.marked_spans(messages, tools)
    ids = tokenizer.encode(text, special=False)
    return _ended(tokenizer, ids, list(_ranges(_offsets(tokenizer, [text]), spans, 0)))


def _alpaca(tokenizer: TrainingTokenizer, record: Instruction) -> Tokenized:
    prompt = record.prompt
    first, ids, _ = _continued(tokenizer, prompt, prompt + record.output, special=True)
    ids = whole_text(ids, tokenizer.end_id).ids
    return Tokenized(ids, ((first, len(ids)),), int(tokenizer.end_id is None))


def _continued(
    tokenizer: TrainingTokenizer, prompt: str, text: str, *, special: bool
) -> tuple[int, list[int], list[str]]:
    """Ids of a text that start with those of its prompt: how many those are, all ids, the parts encoded each alone.

    Where the tokenizer would join the end of the prompt and the start of the answer into one token, the answer is
    encoded on its own: so the engine comes to it. Raises InputError if that would be another text.
    """
    first, ids = tokenizer.encode(prompt, special=special), tokenizer.encode(text, special=special)
    if ids[: len(first)] == first:
        return len(first), ids, [text]
    answer = text[len(prompt) :]
    apart = first + tokenizer.encode(answer, special=False)
    if tokenizer.decode(apart) != tokenizer.decode(ids):
        raise InputError(
            "the tokenizer joins the end of the prompt and the start of the answer into one token",
            hint="let the answer start with a letter, not with a blank or punctuation",
        )
    return len(first), apart, [prompt, answer]


def _offsets(tokenizer: TrainingTokenizer, parts: Sequence[str]) -> Iterator[Span]:
    """Where in the joined text the tokens of its parts stand, in characters."""
    before = 0
    for part in parts:
        yield from ((start + before, stop + before) for start, stop in tokenizer.offsets(part))
        before += len(part)


def _ranges(offsets: Iterable[Span], spans: Sequence[Span], first: int) -> Iterator[Span]:
    """The tokens from number `first` on that stand in each span of characters.

    Byte-level tokenizers cut blanks off their offsets, so that a token may stand nowhere: then it is where it ends.
    """
    places = list(enumerate(offsets))[first:]
    for begin, end in spans:
        inside = [place for place, (start, stop) in places if start < end and max(stop, start + 1) > begin]
        if inside:
            yield inside[0], inside[-1] + 1


def _ended(tokenizer: TrainingTokenizer, ids: list[int], answers: Sequence[Span]) -> Tokenized:
    """An example that ends with its last answer, each answer with the token at which the engine stops.

    What a template writes behind that token (often a line break) is never generated, so it is not learned.
    """
    ranges: list[Span] = []
    ended = True
    for start, stop in answers:
        stop += any(token in tokenizer.stop_ids for token in ids[stop : stop + 1])
        last = next((place for place in reversed(range(start, stop)) if ids[place] in tokenizer.stop_ids), None)
        ended = last is not None
        ranges.append((start, stop if last is None else last + 1))
    return Tokenized(ids[: ranges[-1][1]] if ranges else ids, tuple(ranges), int(not ended))
