"""Sequences of a TensorRT plan: past and present of a layer are one buffer on the device, updated in place.

A buffer holds one row behind the other, each of the plan's whole context. Prompts are read row by row through the
row's part of every buffer; a step runs as many rows at once as the plan's profile takes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np

from rqc.runtime.backends.base import AnyArray, FloatArray, IntArray
from rqc.runtime.backends.cuda import ALIGNMENT, Buffer, Device
from rqc.runtime.backends.graph_io import GATES, CacheSlot, GraphIO
from rqc.runtime.backends.plan_call import DECODE, PREFILL, PlanCall
from rqc.runtime.backends.plan_choice import Plan
from rqc.runtime.errors import InputError


class DeviceSequences:
    """`rows` sequences with caches [rows, heads, context, dim] per layer on the device."""

    def __init__(
        self,
        device: Device,
        plan: Plan,
        io: GraphIO,
        calls: Sequence[PlanCall],
        lock: threading.Lock,
        rows: int,
        gates: FloatArray | None = None,
    ) -> None:
        """calls: the plan's contexts by profile, which `lock` guards."""
        self._device, self._plan, self._io, self._calls, self._lock = device, plan, io, calls, lock
        self._gates = io.gates(gates, rows)
        self._lengths = np.zeros(rows, np.int64)
        self._sizes = [_row_size(slot, plan.context) for slot in io.slots]
        # a row that does not end on the alignment can have none right behind it: it runs on its own
        self._strides = [math.ceil(size / ALIGNMENT) * ALIGNMENT for size in self._sizes]
        self._together = plan.batch[2] if self._strides == self._sizes else 1
        self._caches = [Buffer(device, rows * stride) for stride in self._strides]
        with lock:
            for cache in self._caches:  # garbage could be NaN, and a masked NaN is one still
                device.fill_zeros(cache.address, cache.size)

    @property
    def lengths(self) -> IntArray:
        return self._lengths

    def prefill(self, row: int, ids: IntArray, wanted: IntArray) -> FloatArray:
        """Append ids [n] to one row; logits at the positions `wanted` of this piece, float32 [len(wanted), vocab]."""
        logits: FloatArray = self._append(PREFILL, row, ids[None], wanted[None])[0]
        return logits

    def step(self, tokens: IntArray) -> FloatArray:
        parts = []
        for first in range(0, len(tokens), self._together):
            ids = tokens[first : first + self._together, None]
            parts.append(self._append(DECODE, first, ids, np.zeros_like(ids))[:, 0])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def keep(self, rows: Sequence[int]) -> None:
        picked = list(rows)
        with self._lock:
            for index, (size, stride) in enumerate(zip(self._sizes, self._strides, strict=True)):
                old, new = self._caches[index], Buffer(self._device, len(picked) * stride)
                for place, row in enumerate(picked):
                    self._device.copy(new.address + place * stride, old.address + row * stride, size)
                self._device.synchronize()
                self._caches[index] = new
                old.free()
        self._lengths = self._lengths[picked]
        self._gates = self._gates[picked]

    def _append(self, profile: int, first: int, ids: IntArray, wanted: IntArray) -> FloatArray:
        """Append ids [rows, n] to the rows from `first` on; logits [rows, wanted, vocab]."""
        rows, length = ids.shape
        part = slice(first, first + rows)
        past = self._lengths[part]
        if int(past.max()) + length > self._plan.context:
            raise InputError(
                f"a sequence of {int(past.max()) + length} tokens, the plan's context is {self._plan.context}",
                hint="shorten the prompt, or build the plan with a longer context",
            )
        feeds: dict[str, AnyArray] = {
            "input_ids": ids,
            "position_ids": past[:, None] + np.arange(length),
            "logits_positions": wanted,
            GATES: self._gates[part],
        }
        with self._lock:
            logits = self._calls[profile].run(feeds, self._bound(first, rows), wanted.shape[1])
        self._lengths[part] += length
        return logits

    def _bound(self, first: int, rows: int) -> list[tuple[int, tuple[int, ...]]]:
        """Address and shape of every slot's cache for the rows from `first` on."""
        return [
            (cache.address + first * stride, (rows, slot.heads, self._plan.context, slot.dim))
            for slot, cache, stride in zip(self._io.slots, self._caches, self._strides, strict=True)
        ]


def _row_size(slot: CacheSlot, context: int) -> int:
    return slot.heads * context * slot.dim * np.dtype(slot.dtype).itemsize
