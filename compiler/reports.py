"""How the reports of a compile and of parity read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import Any

from rqc.compiler.verify.gates import measure
from rqc.runtime.inspection import size_text

LINEARS = 5
"""Linears that the table of survival names."""
IDLE = ("ppl_ratio",)
"""Gates of quality count only where a limit was set; `rqc compile --verify` sets none."""


def compile_text(value: Mapping[str, Any]) -> str:
    """A compile's report for a person."""
    rotation = value.get("rotation") or {}
    rows = [
        ("engine", value["engine"] or "none: a dry run"),
        ("size", size_text(value["size_bytes"])),
        ("rotation", _rotation_text(rotation)),
        *_width_rows(value.get("widths") or {}),
        ("time", f"{value['seconds']:.1f} s"),
        ("peak memory", size_text(value["peak_rss_bytes"])),
    ]
    lines = [f"{name:<14}{text}" for name, text in [*rows, *_survival_rows(value.get("survival") or {})]]
    return "\n".join([*lines, parity_text(value["parity"])] if value.get("parity") else lines)


def parity_text(value: Mapping[str, Any], idle: Collection[str] = IDLE, notes: Sequence[str] = ()) -> str:
    """A parity report for a person: figures, gates, notes. idle: gates that are told but do not count."""
    rows = [
        ("tokens", f"{value['tokens']}"),
        ("largest", f"{_figure(value['max_abs'])} difference of a logit"),
        ("mean KL", _figure(value["mean_kl"])),
        ("top-1", f"{_figure(value['top1_agreement'])} agreement"),
        ("perplexity", f"{_figure(value['ppl_engine'])}, PyTorch {_figure(value['ppl_reference'])}"),
        *((f"gate {gate['name']}", _gate_text(gate, _counts(gate, idle))) for gate in value["gates"]),
        *(("note", note) for note in notes),
        ("verdict", "passed" if value["passed"] else "failed"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in rows)


def failed_gates(value: Mapping[str, Any], idle: Collection[str] = IDLE) -> list[str]:
    """Names of the gates that failed and count."""
    return [gate["name"] for gate in value["gates"] if not gate["passed"] and _counts(gate, idle)]


def _counts(gate: Mapping[str, Any], idle: Collection[str]) -> bool:
    return gate["name"] not in idle and measure(gate["name"]) not in idle


def _gate_text(gate: Mapping[str, Any], counts: bool) -> str:
    value = _figure(gate["value"])
    if gate["limit"] is None:
        return f"{value}, no limit"
    if counts:
        return f"{value}, limit {_figure(gate['limit'])}: {'passed' if gate['passed'] else 'FAILED'}"
    return f"{value}, expected {_figure(gate['limit'])}: {'met' if gate['passed'] else 'not met'} (no gate unless set)"


def _rotation_text(rotation: Mapping[str, Any]) -> str:
    chosen = rotation.get("chosen")
    text = ",".join(chosen) or "none" if isinstance(chosen, (list, tuple)) else str(chosen)
    scores = rotation.get("scores") or {}
    told = ", ".join(f"{name} {_figure(score)}" for name, score in scores.items())
    return f"{text} (scores: {told})" if told else text


def _width_rows(widths: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How many linears have which width, where rules or a budget say so."""
    if not widths:
        return []
    counts = ", ".join(f"{count} linears of {bits} bits" for bits, count in widths["linears"].items())
    return [("widths", f"{counts}: {_figure(widths['average_bits'])} on average, without scales")]


def _survival_rows(survival: Mapping[str, float]) -> list[tuple[str, str]]:
    """How much of the adapter is left: in the middle, and in the linears where it is least."""
    if not survival:
        return []
    least = sorted(survival.items(), key=lambda item: (item[1], item[0]))[:LINEARS]
    told = f"median {median(survival.values()):.3f} of the adapter in {len(survival)} linears; least:"
    return [("survival", told), *(("", f"{share:.3f}  {name.removesuffix('.weight')}") for name, share in least)]


def _figure(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
