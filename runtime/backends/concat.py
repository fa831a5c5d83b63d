"""Sequences on graphs with the standard Attention op: the present of a step, past ++ new, is the past of the next.

The arrays stay ONNX Runtime's own (OrtValue) from step to step. Rows of different length lie flush right: a row's
tokens are the last `length` slots of the cache, slots before them are masked. So distances between slots
are distances between positions, which graphs with a sliding window may count on, and every query sees at least itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from rqc.runtime.backends.base import AnyArray, FloatArray, IntArray
from rqc.runtime.backends.graph_io import GATES, GraphIO
from rqc.runtime.backends.session import run_bound


class ConcatSequences:
    """`rows` sequences over caches [rows, heads, slots, dim] per layer that grow by what is appended."""

    def __init__(self, session: ort.InferenceSession, io: GraphIO, rows: int, gates: FloatArray | None = None) -> None:
        self._session = session
        self._gates = io.gates(gates, rows)
        self._io = io
        self._lengths = np.zeros(rows, np.int64)
        self._slots = 0
        self._past = [ort.OrtValue.ortvalue_from_numpy(slot.zeros(rows, 0)) for slot in io.slots]

    @property
    def lengths(self) -> IntArray:
        return self._lengths

    def append(self, ids: IntArray, wanted: IntArray) -> FloatArray:
        """Append ids [rows, n] to every row; logits at `wanted` [rows, m] of this piece, float32 [rows, m, vocab]."""
        rows, length = ids.shape
        slots = self._slots + length
        feeds: dict[str, AnyArray] = {
            "input_ids": ids,
            "position_ids": self._lengths[:, None] + np.arange(length),
            "attention_mask": (np.arange(slots) >= (self._slots - self._lengths)[:, None]).astype(np.int64),
            "logits_positions": wanted,
            GATES: self._gates,
        }
        pick = not self._io.takes("logits_positions")
        logits = np.empty((rows, length if pick else wanted.shape[1], self._io.vocab_size), np.float32)
        self._past = self._run({name: np.ascontiguousarray(x) for name, x in feeds.items()}, logits)
        self._lengths = self._lengths + length
        self._slots = slots
        return np.take_along_axis(logits, wanted[:, :, None], axis=1) if pick else logits

    def _run(self, feeds: dict[str, AnyArray], logits: FloatArray) -> list[Any]:
        """Run once; the new caches in slot order, without a copy."""
        binding: Any = self._session.io_binding()
        for name, array in feeds.items():
            if self._io.takes(name):
                binding.bind_input(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
        for slot, past in zip(self._io.slots, self._past, strict=True):
            binding.bind_ortvalue_input(slot.past, past)
            binding.bind_output(slot.present, "cpu")
        binding.bind_output("logits", "cpu", 0, np.float32, list(logits.shape), logits.ctypes.data)
        run_bound(self._session, binding)
        return list(binding.get_outputs()[: len(self._past)])

    def step(self, tokens: IntArray) -> FloatArray:
        ids = tokens.reshape(-1, 1)
        return self.append(ids, np.zeros_like(ids))[:, 0]

    def keep(self, rows: Sequence[int]) -> None:
        picked = list(rows)
        self._lengths = self._lengths[picked]
        self._gates = self._gates[picked]
        kept = int(self._lengths.max())
        first, self._slots = self._slots - kept, kept
        self._past = [_ortvalue(past.numpy()[picked, :, first:]) for past in self._past]

    @classmethod
    def joined(cls, parts: Sequence[ConcatSequences]) -> ConcatSequences:
        """The sequences of all parts as the rows of one batch, padded at the left."""
        if len(parts) == 1:
            return parts[0]
        batch = cls(parts[0]._session, parts[0]._io, 0)
        batch._slots = max(part._slots for part in parts)
        batch._lengths = np.concatenate([part._lengths for part in parts])
        batch._gates = np.concatenate([part._gates for part in parts])
        for index, slot in enumerate(batch._io.slots):
            cache = slot.zeros(len(batch._lengths), batch._slots)
            row = 0
            for part in parts:
                own = part._past[index].numpy()
                cache[row : row + len(own), :, batch._slots - part._slots :] = own
                row += len(own)
            batch._past[index] = _ortvalue(cache)
        return batch


def _ortvalue(array: AnyArray) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
