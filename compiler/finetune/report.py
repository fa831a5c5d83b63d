"""What a fine-tune was: its report, and training.json beside the adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

FORMAT, VERSION = "rqc-training", 1


@dataclass(frozen=True)
class FinetuneReport:
    """The result of a fine-tune.

    seconds: of the process that finished it. train_loss: the mean over all steps; eval_loss: the last one measured.
    base_bytes: the blocks' linears as they were held, float_bytes: as floats. dropped: records of which truncation left
    no answer. plain: the adapter in the model's own basis, if it was asked for.
    """

    adapter: str
    steps: int
    seconds: float
    train_loss: float
    eval_loss: float | None
    trainable_parameters: int
    base_bytes: int
    float_bytes: int
    peak_rss_bytes: int
    dropped: int
    plain: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The report with the keys of `rqc finetune --json`."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FinetuneReport:
        """The inverse of `to_json`."""
        return cls(**{each.name: value[each.name] for each in fields(cls)})

    def to_text(self) -> str:
        """The report for a person."""
        losses = f"training {self.train_loss:.4f}"
        if self.eval_loss is not None:
            losses += f", evaluation {self.eval_loss:.4f}"
        rows = [
            ("adapter", self.adapter),
            *([("plain", self.plain)] if self.plain else []),
            ("steps", f"{self.steps} in {self.seconds:.1f} s"),
            ("loss", losses),
            ("trained", f"{self.trainable_parameters:,} parameters"),
            ("base", memory_text(self.base_bytes, self.float_bytes)),
            ("peak memory", f"{self.peak_rss_bytes / 1e6:.0f} MB resident"),
        ]
        if self.dropped:
            rows.append(("dropped", f"{self.dropped} records of which truncation left no answer"))
        return "\n".join(f"{name:<14}{value}" for name, value in rows)


def memory_text(held: int, as_floats: int) -> str:
    """What the blocks' linears take, beside what they would take as floats."""
    if held == as_floats:
        return f"{held / 1e6:.1f} MB, in floats"
    return f"{held / 1e6:.1f} MB on its grid, {as_floats / 1e6:.1f} MB as floats"


def training_json(run: Mapping[str, Any], report: FinetuneReport, log: list[dict[str, float]]) -> dict[str, Any]:
    """training.json: what the run was of, its result, and its log by steps."""
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "run": dict(run),
        "report": report.to_json(),
        "log": log,
    }


def log_of(history: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Trainer's history as one entry per step: loss, lr, gradient norm, and eval_loss where there was an evaluation."""
    names = {
        "loss": "loss",
        "learning_rate": "lr",
        "grad_norm": "grad_norm",
        "epoch": "epoch",
        "eval_loss": "eval_loss",
    }
    steps: dict[int, dict[str, float]] = {}
    for entry in history:
        found = {names[key]: float(value) for key, value in entry.items() if key in names}
        if "loss" in found or "eval_loss" in found:
            step = int(entry["step"])
            steps.setdefault(step, {"step": step}).update(found)
    return [steps[step] for step in sorted(steps)]
