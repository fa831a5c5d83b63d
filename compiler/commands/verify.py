"""`rqc verify`: parsing only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from rqc.compiler.commands.parameters import EnginePath, Json, ModelDir, TextFile, Threads
from rqc.compiler.console import result_on_stdout
from rqc.runtime import doctor as doctors
from rqc.runtime.errors import InputError, ParityError


def verify(
    engine: EnginePath,
    model_dir: ModelDir,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]DIR", help="The adapter that the engine was compiled with; repeatable."),
    ] = None,
    text: TextFile = None,
    tokens: Annotated[int, typer.Option(help="Tokens to compare.")] = 2048,
    window: Annotated[int, typer.Option(help="Tokens of one window, capped at the context.")] = 1024,
    gate: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A limit such as ppl_ratio=1.05; repeatable.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare an engine with PyTorch; exit 1 if a gate fails."""
    gates = dict(_gate(limit) for limit in gate or [])
    doctors.require_compile()
    from rqc.compiler.reports import failed_gates, parity_text
    from rqc.compiler.verify.engine import verify_engine

    with result_on_stdout() as emit:
        report = verify_engine(
            engine,
            model_dir,
            adapter=adapter,
            text=text,
            tokens=tokens,
            window=window,
            gates=gates,
            threads=threads,
        )
        value, idle = report.to_json(), [gate.name for gate in report.gates if not gate.counts]
        emit(value, parity_text(value, idle, report.notes), as_json)
    if not report.passed:
        fail_gates(failed_gates(value, idle), as_json)


def _gate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise InputError(f"--gate {text}", hint="--gate NAME=VALUE, such as ppl_ratio=1.05") from None


def fail_gates(failed: Sequence[str], as_json: bool) -> None:
    """End with exit code 1; the report is already on stdout."""
    if as_json:
        raise typer.Exit(1)
    raise ParityError(f"gates failed: {', '.join(failed)}", hint="the table above has values and limits")
