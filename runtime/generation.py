"""The generation loop: one token per row and step, rows that end leave the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from rqc.runtime.backends.base import Backend, FloatArray, IntArray
from rqc.runtime.options import GenerationOptions
from rqc.runtime.sampling import Sampler
from rqc.runtime.text import TextCodec, TextStream

FinishReason: TypeAlias = Literal["stop", "length", "context"]


class StopFilter:
    """Cuts a growing text at the first stop string, and holds back an end that may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The part of the text that can be given out now; sets `stopped` once a stop string is complete."""
        if self.stopped or not piece:
            return ""
        text = self._held + piece
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:  # the stop string that is complete first, wherever the pieces happen to break
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = self._open_end(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _open_end(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(len(text), max((len(stop) for stop in self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


@dataclass
class Row:
    """One continuation: its tokens so far, how it may go on and, once ended, why it did."""

    prompt_tokens: int
    budget: int  # new tokens that it may have at most
    sampler: Sampler
    stop: StopFilter
    stream: TextStream | None
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def accept(self, logits: FloatArray, eos: frozenset[int], at_budget: FinishReason) -> str:
        """Choose the next token from logits [vocab]; the text that became certain. Sets finish_reason at an end."""
        token = self.sampler(logits)
        if token in eos:
            return self._end("stop")
        self.tokens.append(token)
        piece = self.stop.push(self.stream.push(token)) if self.stream is not None else ""
        if self.stop.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.budget:
            piece += self._end(at_budget)
        return piece

    def _end(self, reason: FinishReason) -> str:
        """End here; the text that was still held back."""
        self.finish_reason = reason
        if self.stream is None:
            return ""
        rest = self.stop.push(self.stream.finish())
        if self.stop.stopped:
            self.finish_reason = "stop"
        return rest + self.stop.finish()


class Generation:
    """A batch being continued. Iterating gives (row, text piece) as they become certain, until every row has ended."""

    def __init__(
        self,
        backend: Backend,
        prompts: Sequence[IntArray],
        options: GenerationOptions,
        *,
        eos: frozenset[int],
        context_length: int,
        codec: TextCodec | None,
        gates: FloatArray | None = None,
    ) -> None:
        """prompts: int64 [length] each, none longer than the context; codec None: tokens only, no text.

        gates: float32 [rows, adapters], for engines whose adapters can be switched.
        """
        self._backend = backend
        self._prompts = list(prompts)
        self._gates = gates
        self._eos = eos
        self._wanted = int(options.max_new_tokens)
        samplers = options.samplers(len(prompts))
        self.rows = [
            Row(
                prompt_tokens=len(ids),
                budget=min(self._wanted, context_length - len(ids)),
                sampler=sampler,
                stop=StopFilter(options.stops),
                stream=codec.stream() if codec is not None else None,
            )
            for ids, sampler in zip(prompts, samplers, strict=True)
        ]
        for row in self.rows:
            if row.budget == 0:
                row.finish_reason = "context"

    def __iter__(self) -> Iterator[tuple[int, str]]:
        active = [index for index, row in enumerate(self.rows) if row.finish_reason is None]
        if not active:
            return
        gates = None if self._gates is None else self._gates[active]
        sequences, logits = self._backend.start([self._prompts[index] for index in active], gates)
        while True:
            for place, index in enumerate(active):
                piece = self._advance(self.rows[index], logits[place])
                if piece:
                    yield index, piece
            kept = [place for place, index in enumerate(active) if self.rows[index].finish_reason is None]
            if not kept:
                return
            if len(kept) < len(active):
                sequences.keep(kept)
                active = [active[place] for place in kept]
            logits = sequences.step(np.array([self.rows[index].tokens[-1] for index in active], np.int64))

    def _advance(self, row: Row, logits: FloatArray) -> str:
        return row.accept(logits, self._eos, "length" if row.budget == self._wanted else "context")
