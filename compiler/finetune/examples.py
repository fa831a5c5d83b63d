"""Tokenized examples in flat arrays (5 bytes a token) as the torch Dataset that a Trainer takes, and their split."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from rqc.compiler.finetune.chat_spans import Tokenized
from rqc.runtime.errors import InputError

IGNORED = -100
"""The label of a token without loss (torch.nn.CrossEntropyLoss)."""


@dataclass(frozen=True, eq=False)
class Columns:
    """ids int32, answer bool [tokens]; starts int64 [examples + 1]; answered (tokens with loss) and records (numbers)
    int64 [examples]; of the file, how many were dropped, truncated and unended."""

    ids: NDArray[np.int32]
    answer: NDArray[np.bool_]
    starts: NDArray[np.int64]
    answered: NDArray[np.int64]
    records: NDArray[np.int64]
    dropped: int
    truncated: int
    unended: int


class Examples(Dataset[dict[str, Any]]):
    """Examples as dicts: input_ids and labels int64 [length], length. Labels are `IGNORED` outside of the answers.

    dropped, truncated, unended: of the file that they come from, examples left out because truncation left no answer,
    examples cut to the sequence length, answers without a token at which the engine stops.
    """

    def __init__(self, columns: Columns, chosen: NDArray[np.int64]) -> None:
        """chosen: which of the examples, in this order."""
        self._columns, self._chosen = columns, chosen
        self.dropped, self.truncated, self.unended = columns.dropped, columns.truncated, columns.unended
        self.lengths: list[int] = (columns.starts[chosen + 1] - columns.starts[chosen]).tolist()
        self.tokens = sum(self.lengths)
        self.answer_tokens = int(columns.answered[chosen].sum())

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Raises IndexError past the end, so that the examples can be iterated over."""
        example = self._chosen[place]
        start, stop = self._columns.starts[example : example + 2]
        ids = torch.from_numpy(self._columns.ids[start:stop].astype(np.int64))
        answer = torch.from_numpy(self._columns.answer[start:stop].copy())
        return {"input_ids": ids, "labels": ids.where(answer, IGNORED), "length": len(ids)}

    @property
    def records(self) -> NDArray[np.int64]:
        """The number of the record that each example comes from."""
        return self._columns.records[self._chosen]

    def those(self, chosen: NDArray[np.bool_]) -> Examples:
        """The examples that are chosen."""
        return Examples(self._columns, self._chosen[chosen])

    def summary(self) -> str:
        """How many there are, and what was left out, in one line."""
        parts = [f"{len(self)} examples", f"{self.tokens} tokens, {self.answer_tokens} of them in answers"]
        if self.truncated:
            parts.append(f"{self.truncated} cut to the sequence length")
        if self.dropped:
            parts.append(f"{self.dropped} dropped: no answer left after the cut")
        if self.unended:
            parts.append(f"{self.unended} answers without a token at which the engine stops")
        return "; ".join(parts)


class Gathering:
    """Examples while they are read: cut, checked and counted, one after the other."""

    def __init__(self, seq_len: int, vocab_size: int) -> None:
        """Raises InputError for a sequence length in which nothing can be predicted."""
        if seq_len < 2:
            raise InputError(
                f"a sequence length of {seq_len} leaves no token to predict", hint="give --seq-len 2 or more"
            )
        self._seq_len, self._vocab_size = seq_len, vocab_size
        self._ids, self._answer = array("i"), bytearray()
        self._starts, self._answered, self._records = array("q", [0]), array("q"), array("q")
        self.dropped = self.truncated = self.unended = 0
        self.needed: int | None = None
        """The smallest sequence length that would keep an answer token of a dropped example."""

    def add(self, example: Tokenized, record: int, place: str) -> None:
        """Take an example, cut from the right to the sequence length; drop and count it if no answer token is left.

        The first token has no prediction, so it counts as none of the answer. Raises InputError for ids outside of the
        vocabulary.
        """
        ids = example.ids[: self._seq_len]
        if max(ids, default=0) >= self._vocab_size:
            token = next(token for token in ids if token >= self._vocab_size)
            raise InputError(
                f"{place}: token {token} is outside of the model's vocabulary of {self._vocab_size}",
                hint="the tokenizer belongs to another model: put the model's own beside its weights",
            )
        answer = bytearray(len(ids))
        for start, stop in example.answers:
            answer[max(start, 1) : stop] = b"\1" * len(answer[max(start, 1) : stop])
        if not any(answer):
            self._drop(example)
            return
        self.truncated += len(ids) < len(example.ids)
        self.unended += example.unended
        self._ids.extend(ids)
        self._answer += answer
        self._starts.append(len(self._ids))
        self._answered.append(sum(answer))
        self._records.append(record)

    def _drop(self, example: Tokenized) -> None:
        self.dropped += 1
        wanted = [max(start, 1) + 1 for start, stop in example.answers if stop > max(start, 1)]
        self.needed = min([*wanted, *([] if self.needed is None else [self.needed])], default=None)

    def examples(self) -> Examples:
        """All that were taken."""
        columns = Columns(
            np.frombuffer(self._ids, np.int32),
            np.frombuffer(self._answer, np.bool_),
            np.frombuffer(self._starts, np.int64),
            np.frombuffer(self._answered, np.int64),
            np.frombuffer(self._records, np.int64),
            self.dropped,
            self.truncated,
            self.unended,
        )
        return Examples(columns, np.arange(len(columns.answered)))


def split(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples | None]:
    """Training and evaluation examples: a fraction below 1, or a number, of the records; 0 keeps all for training.

    Deterministic: records are drawn in the order of a hash of seed and number. Neither side is empty, and no record is
    on both. Raises InputError where that cannot be.
    """
    whole = fraction >= 1
    if not 0 <= fraction < float("inf") or (whole and fraction != int(fraction)):
        raise InputError(
            f"{fraction} is no evaluation split", hint="give a fraction below 1, a whole number of examples, or 0"
        )
    if fraction == 0:
        return examples, None
    records = np.unique(examples.records)
    count = int(fraction) if whole else max(round(fraction * len(records)), 1)
    if count >= len(records):
        if whole or len(records) < 2:
            raise InputError(
                f"{count} of {len(records)} examples for evaluation leave none for training",
                hint="give more data, a smaller evaluation split, or a file of its own with --eval-data",
            )
        count = len(records) - 1
    drawn = sorted(records.tolist(), key=lambda record: hashlib.sha256(f"{seed}:{record}".encode()).digest())
    chosen = np.isin(examples.records, drawn[:count])
    return examples.those(~chosen), examples.those(chosen)
