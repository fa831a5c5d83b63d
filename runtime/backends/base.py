"""What every backend offers the engine: sequences that are started from a prompt and advanced token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]
AnyArray: TypeAlias = npt.NDArray[Any]


class Sequences(Protocol):
    """A batch of running sequences with their key-value caches. Rows are independent of each other."""

    @property
    def lengths(self) -> IntArray:
        """Tokens in the cache of each row, int64 [rows]."""

    def step(self, tokens: IntArray) -> FloatArray:
        """Append one token per row, int64 [rows]; return the next logits, float32 [rows, vocab].

        The result may be a view of a buffer that the next call overwrites.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""


class Backend(Protocol):
    """A loaded model. Sequences share nothing, so an abandoned one leaves the backend as it was."""

    @property
    def threads(self) -> int:
        """Threads that one operator may use."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""

    @property
    def adapters(self) -> int:
        """Adapters that can be switched on, each by its gate."""

    @property
    def context_length(self) -> int:
        """Tokens that a sequence can have."""

    def start(self, prompts: Sequence[IntArray], gates: FloatArray | None = None) -> tuple[Sequences, FloatArray]:
        """Read the prompts, each int64 [length >= 1]; return the sequences and the logits after each, [rows, vocab].

        gates: float32 [rows, adapters], how much of each adapter a row adds; None for the model alone.
        """

    def score(self, ids: IntArray, gates: FloatArray | None = None) -> Iterator[FloatArray]:
        """Logits at every position of one sequence from an empty cache, in pieces [n, vocab]; gates [1, adapters]."""

    def close(self) -> None:
        """Release the model."""
