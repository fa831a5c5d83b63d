"""Sequences on GroupQueryAttention graphs: past and present of a layer are one buffer, written in place.

ONNX Runtime's CPU kernel (1.31) recognises the shared buffer by its address, takes the valid length of each row from
`seqlens_k`, and appends. What was found by trial: several tokens on top of a past are exact for one row and refused
for more ("batch_size must be 1 when sequence_length > 1 and past context is given"); scratch memory depends neither on
the capacity nor on the past. So prompts are read row by row, in chunks, through views of the common buffers, and
only single-token steps run all rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from rqc.runtime.backends.base import AnyArray, FloatArray, IntArray
from rqc.runtime.backends.graph_io import GATES, GraphIO
from rqc.runtime.backends.session import run_bound

_FIRST_CAPACITY = 256


class SharedSequences:
    """`rows` sequences over buffers [rows, heads, capacity, dim] per layer, capacity a power of two up to `limit`."""

    def __init__(
        self, session: ort.InferenceSession, io: GraphIO, rows: int, limit: int, gates: FloatArray | None = None
    ) -> None:
        self._session = session
        self._gates = io.gates(gates, rows)
        self._io = io
        self._limit = limit
        self._lengths = np.zeros(rows, np.int64)
        self._capacity = min(_FIRST_CAPACITY, limit)
        self._caches = [slot.zeros(rows, self._capacity) for slot in io.slots]
        self._decode: _Call | None = None

    @property
    def lengths(self) -> IntArray:
        return self._lengths

    @property
    def capacity(self) -> int:
        """Positions for which the buffers have room."""
        return self._capacity

    def prefill(self, row: int, ids: IntArray, wanted: IntArray) -> FloatArray:
        """Append ids [n] to one row; logits at the positions `wanted` of this piece, float32 [len(wanted), vocab]."""
        self._reserve(int(self._lengths[row]) + len(ids))
        caches = [cache[row : row + 1] for cache in self._caches]
        call = _Call(self._session, self._io, caches, ids[None, :], wanted[None, :], self._gates[row : row + 1])
        logits: FloatArray = call.run(self._lengths[row : row + 1])[0]
        self._lengths[row] += len(ids)
        return logits

    def step(self, tokens: IntArray) -> FloatArray:
        self._reserve(int(self._lengths.max()) + 1)
        if self._decode is None:
            first = np.zeros((len(tokens), 1), np.int64)
            self._decode = _Call(self._session, self._io, self._caches, first, first, self._gates)
        self._decode.ids[:, 0] = tokens
        logits: FloatArray = self._decode.run(self._lengths)[:, 0]
        self._lengths += 1
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        picked = list(rows)
        for index, cache in enumerate(self._caches):
            self._caches[index] = np.ascontiguousarray(cache[picked])
        self._lengths = self._lengths[picked]
        self._gates = self._gates[picked]
        self._decode = None

    def _reserve(self, length: int) -> None:
        """Double the capacity until `length` fits, copying the valid part layer by layer."""
        if length <= self._capacity:
            return
        capacity = self._capacity
        while capacity < length:
            capacity *= 2
        self._capacity = max(length, min(capacity, self._limit))
        valid = int(self._lengths.max())
        self._decode = None
        for index, slot in enumerate(self._io.slots):
            grown = slot.zeros(len(self._lengths), self._capacity)
            grown[:, :, :valid] = self._caches[index][:, :, :valid]
            self._caches[index] = grown


class _Call:
    """One binding of the graph for a fixed shape: buffers are bound by address once, later runs only change values."""

    def __init__(
        self,
        session: ort.InferenceSession,
        io: GraphIO,
        caches: list[AnyArray],
        ids: IntArray,
        wanted: IntArray,
        gates: FloatArray,
    ) -> None:
        rows, length = ids.shape
        self._session = session
        self._caches = caches  # the binding holds addresses only
        self._wanted = wanted
        self._pick = not io.takes("logits_positions")
        self._feeds: dict[str, AnyArray] = {
            "input_ids": np.array(ids, np.int64),
            "position_ids": np.zeros((rows, length), np.int64),
            "seqlens_k": np.zeros(rows, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "logits_positions": np.array(wanted, np.int64),
            GATES: np.array(gates, np.float32),
        }
        shape = (rows, length if self._pick else wanted.shape[1], io.vocab_size)
        self._logits = np.empty(shape, np.float32)
        self._binding: Any = session.io_binding()
        for name, array in self._feeds.items():
            if io.takes(name):
                _bind(self._binding.bind_input, name, array)
        for slot, cache in zip(io.slots, caches, strict=True):
            _bind(self._binding.bind_input, slot.past, cache)
            _bind(self._binding.bind_output, slot.present, cache)
        _bind(self._binding.bind_output, "logits", self._logits)

    @property
    def ids(self) -> AnyArray:
        """The token ids that the next run appends, int64 [rows, length]: written in place."""
        return self._feeds["input_ids"]

    def run(self, past: IntArray) -> FloatArray:
        """Append to rows that hold `past` [rows] tokens; logits [rows, wanted, vocab], a view of a reused buffer."""
        length = self.ids.shape[1]
        self._feeds["position_ids"][:] = past[:, None] + np.arange(length)
        self._feeds["seqlens_k"][:] = past + (length - 1)
        self._feeds["total_sequence_length"][...] = int(past.max()) + length
        run_bound(self._session, self._binding)
        if self._pick:
            return np.take_along_axis(self._logits, self._wanted[:, :, None], axis=1)
        return self._logits


def _bind(bind: Any, name: str, array: AnyArray) -> None:
    bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
