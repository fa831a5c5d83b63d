"""The ONNX Runtime backend: prompts in chunks, then all rows one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rqc.runtime.backends.base import FloatArray, IntArray, Sequences
from rqc.runtime.backends.concat import ConcatSequences
from rqc.runtime.backends.graph_io import GraphIO, read_graph_io
from rqc.runtime.backends.session import checked_threads, open_session
from rqc.runtime.backends.shared import SharedSequences
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import EngineFormatError, InputError

PREFILL_CHUNK = 512  # tokens per run while a prompt is read: enough for the matrix products, little scratch memory
_SCORE_BYTES = 64 << 20  # logits of one run of `score`


class OrtBackend:
    """A session on an engine's graph. Every call of `start` and `score` has caches of its own."""

    def __init__(
        self, engine: EngineFile, *, threads: int | None = None, spin: bool = True, chunk: int = PREFILL_CHUNK
    ) -> None:
        graph = engine.manifest.get("graph")
        if not isinstance(graph, dict) or graph.get("cache") not in ("shared", "concat"):
            raise EngineFormatError(f"the manifest of {engine.path} does not say what cache its graph takes")
        self._threads = checked_threads(threads)
        self._shared = graph["cache"] == "shared"
        self._limit = int(engine.manifest["context_length"])
        self._chunk = chunk
        self._open_session: Any = open_session(engine, self._threads, spin=spin)
        self._io: GraphIO = read_graph_io(self._session.get_inputs(), self._session.get_outputs(), graph)

    @property
    def _session(self) -> Any:
        if self._open_session is None:
            raise InputError("this engine is closed", hint="load it again with rqc.load")
        return self._open_session

    @property
    def threads(self) -> int:
        return self._threads

    @property
    def vocab_size(self) -> int:
        return self._io.vocab_size

    @property
    def adapters(self) -> int:
        return self._io.adapters

    @property
    def context_length(self) -> int:
        return self._limit

    def start(self, prompts: Sequence[IntArray], gates: FloatArray | None = None) -> tuple[Sequences, FloatArray]:
        gates = self._io.gates(gates, len(prompts))
        if self._shared:
            return self._start_shared(prompts, gates)
        parts, logits = [], []
        for row, ids in enumerate(prompts):
            part = ConcatSequences(self._session, self._io, 1, gates[row : row + 1])
            for begin, end in self._pieces(len(ids), self._chunk):
                last = part.append(ids[None, begin:end], _last(end - begin)[None])
            parts.append(part)
            logits.append(last[0, 0])
        return ConcatSequences.joined(parts), np.stack(logits)

    def _start_shared(self, prompts: Sequence[IntArray], gates: FloatArray) -> tuple[Sequences, FloatArray]:
        sequences = SharedSequences(self._session, self._io, len(prompts), self._limit, gates)
        logits = np.empty((len(prompts), self.vocab_size), np.float32)
        for row, ids in enumerate(prompts):
            for begin, end in self._pieces(len(ids), self._chunk):
                last = sequences.prefill(row, ids[begin:end], _last(end - begin))
            logits[row] = last[0]
        return sequences, logits

    def score(self, ids: IntArray, gates: FloatArray | None = None) -> Iterator[FloatArray]:
        chunk = min(self._chunk, max(1, _SCORE_BYTES // (4 * self.vocab_size)))
        append = self._single_row(gates)
        for begin, end in self._pieces(len(ids), chunk):
            yield append(ids[begin:end], np.arange(end - begin))

    def _single_row(self, gates: FloatArray | None) -> Callable[[IntArray, IntArray], FloatArray]:
        """A fresh sequence as a function: append ids [n], get the logits at the wanted [m] of them, [m, vocab]."""
        if self._shared:
            shared = SharedSequences(self._session, self._io, 1, self._limit, gates)
            return lambda ids, wanted: shared.prefill(0, ids, wanted)
        concat = ConcatSequences(self._session, self._io, 1, gates)
        return lambda ids, wanted: concat.append(ids[None], wanted[None])[0]

    @staticmethod
    def _pieces(length: int, chunk: int) -> Iterator[tuple[int, int]]:
        for begin in range(0, length, chunk):
            yield begin, min(begin + chunk, length)

    def close(self) -> None:
        """Drop the session; the memory goes back when running sequences are dropped too."""
        self._open_session = None


def _last(length: int) -> IntArray:
    return np.array([length - 1], np.int64)
