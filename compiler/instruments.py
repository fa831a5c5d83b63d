"""Instruments around the passes: time, drift, dumps. A pass knows nothing of them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from rqc.compiler.probe import Logits, drift, run_stage, save_stage
from rqc.passes.base import Pass, sizes
from rqc.runtime.errors import InputError, PassError

EXACT_DRIFT = 1e-5
"""Relative drift of the logits, float32, up to which a pass counts as exact."""
PROBE_TOKENS = 64


class Progress(Protocol):
    """Where progress goes: whole lines, and how much of a long step is done."""

    def line(self, text: str) -> None:
        """One finished step."""

    def advance(self, label: str, done: int, total: int) -> None:
        """A step that is under way: `done` of `total` bytes."""


class Silent:
    """No progress at all."""

    def line(self, text: str) -> None:
        """Say nothing."""

    def advance(self, label: str, done: int, total: int) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: its time in seconds and, if it was measured, the drift that it caused."""

    name: str
    exact: bool
    seconds: float
    drift: float | None
    detail: str = ""

    def to_json(self) -> dict[str, object]:
        """The record as it stands in reports."""
        return {
            "name": self.name,
            "exact": self.exact,
            "seconds": round(self.seconds, 4),
            "drift": self.drift,
            "detail": self.detail,
        }


@dataclass
class Instruments:
    """Runs passes one after the other; measures each if `verify_each`, and writes each stage to `dump_ir` if given."""

    verify_each: bool = False
    dump_ir: Path | None = None
    progress: Progress = field(default_factory=Silent)
    records: list[PassRecord] = field(default_factory=list)
    _logits: Logits | None = None

    def run(self, model: ir.Model, passes: Iterable[Pass]) -> None:
        """Apply `passes` in order. Raises PassError, naming the pass, when one that claims to be exact is not."""
        self._dump(model, "Import")
        for step in passes:
            before = self._before(model)
            started = time.perf_counter()
            step(model)
            seconds = time.perf_counter() - started
            record = PassRecord(step.label, step.exact, seconds, self._drift(model, before), step.detail)
            self.records.append(record)
            self._dump(model, step.label)
            self.progress.line(_told(record))
            if record.exact and record.drift is not None and record.drift > EXACT_DRIFT:
                raise PassError(
                    f"pass {record.name} claims to be exact and moves the logits by {record.drift:.1e} "
                    f"(limit {EXACT_DRIFT:.0e})",
                    hint="this is a fault of rqc: please report it with the model's config.json",
                )

    def _before(self, model: ir.Model) -> Logits | None:
        if self.verify_each and self._logits is None:
            self._logits = run_stage(model, probe_tokens(model))
        return self._logits

    def _drift(self, model: ir.Model, before: Logits | None) -> float | None:
        if before is None:
            return None
        self._logits = run_stage(model, probe_tokens(model))
        return drift(before, self._logits)

    def _dump(self, model: ir.Model, label: str) -> None:
        if self.dump_ir is None:
            return
        try:
            self.dump_ir.mkdir(parents=True, exist_ok=True)
            index = len(self.records)
            slug = re.sub(r"(?<!^)(?=[A-Z])", "-", label).lower()
            save_stage(model, self.dump_ir / f"{index:02d}-{slug}.onnx")
        except OSError as error:
            raise InputError(
                f"--dump-ir {self.dump_ir}: {error}", hint="give a directory that can be written"
            ) from error


def probe_tokens(model: ir.Model) -> np.ndarray:
    """Token ids that a stage is run on: a fixed draw, longer than the shortest sliding window where that is short."""
    vocabulary = sizes(model.graph.outputs[0])[-1]
    windows = [int(node.metadata_props["rqc.window"]) for node in model.graph if "rqc.window" in node.metadata_props]
    count = min(512, max([PROBE_TOKENS, *(window + 16 for window in windows)]))
    return np.random.Generator(np.random.PCG64(0)).integers(0, vocabulary, count)


def _told(record: PassRecord) -> str:
    kind = "exact" if record.exact else "lossy"
    drifted = "" if record.drift is None else f"  drift {record.drift:.1e}"
    detail = f"  {record.detail}" if record.detail else ""
    return f"{record.name:<24} {kind}  {record.seconds:7.2f} s{drifted}{detail}"
