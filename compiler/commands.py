"""What `rqc compile` and `rqc verify` do once their words are parsed, and how their results read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rqc.compiler.console import Steps
from rqc.compiler.pipeline import compile_model
from rqc.compiler.recipe import Recipe
from rqc.compiler.verify import verify_engine
from rqc.runtime.inspection import size_text


def recipe_of(path: Path | None, flags: Mapping[str, Any]) -> Recipe:
    """The recipe file with the flags over it; flags that are no field of a recipe are other options of the command."""
    names = {field.name for field in fields(Recipe)}
    return Recipe.layered(path, {name: value for name, value in flags.items() if name in names})


def compile_(
    model_dir: Path,
    output: Path | None,
    recipe: Recipe,
    verify_after: bool,
    options: Mapping[str, Any],
    steps: Steps,
) -> tuple[dict[str, Any], bool]:
    """Compile and, if wanted, verify: the report as plain values, and whether every gate passed."""
    report = compile_model(model_dir, output, recipe=recipe, progress=steps, **options)
    value: dict[str, Any] = dict(report.to_json())
    if not verify_after or output is None:
        return value, True
    steps.line("verifying against PyTorch")
    parity = verify_engine(output, model_dir)
    return {**value, "parity": parity.to_json()}, parity.passed


def verify(
    engine: Path,
    model_dir: Path,
    text: Path | None,
    tokens: int,
    window: int,
    gates: Mapping[str, float],
    threads: int | None,
) -> dict[str, Any]:
    """The parity report as plain values."""
    report = verify_engine(
        engine, model_dir, text=text, tokens=tokens, window=window, gates=dict(gates), threads=threads
    )
    return dict(report.to_json())


def compile_text(value: Mapping[str, Any]) -> str:
    """A compile's report for a person."""
    rotation = value.get("rotation") or {}
    rows = [
        ("engine", value["engine"] or "none: a dry run"),
        ("size", size_text(value["size_bytes"])),
        ("rotation", _rotation_text(rotation)),
        ("time", f"{value['seconds']:.1f} s"),
        ("peak memory", size_text(value["peak_rss_bytes"])),
    ]
    lines = [f"{name:<14}{text}" for name, text in rows]
    return "\n".join([*lines, parity_text(value["parity"])] if value.get("parity") else lines)


def parity_text(value: Mapping[str, Any]) -> str:
    """A parity report for a person: figures, then one line for each gate."""
    rows = [
        ("tokens", f"{value['tokens']}"),
        ("largest", f"{_figure(value['max_abs'])} difference of a logit"),
        ("mean KL", _figure(value["mean_kl"])),
        ("top-1", f"{_figure(value['top1_agreement'])} agreement"),
        ("perplexity", f"{_figure(value['ppl_engine'])}, PyTorch {_figure(value['ppl_reference'])}"),
        *((f"gate {gate['name']}", _gate_text(gate)) for gate in value["gates"]),
        ("verdict", "passed" if value["passed"] else "failed"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in rows)


def _gate_text(gate: Mapping[str, Any]) -> str:
    verdict = "passed" if gate["passed"] else "FAILED"
    limit = "no limit" if gate["limit"] is None else f"limit {_figure(gate['limit'])}"
    return f"{_figure(gate['value'])}, {limit}: {verdict}"


def _rotation_text(rotation: Mapping[str, Any]) -> str:
    chosen = rotation.get("chosen")
    text = ",".join(chosen) or "none" if isinstance(chosen, (list, tuple)) else str(chosen)
    scores = rotation.get("scores") or {}
    told = ", ".join(f"{name} {_figure(score)}" for name, score in scores.items())
    return f"{text} (scores: {told})" if told else text


def _figure(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
