"""`rqc build`: a TensorRT plan for an engine that has its ONNX part."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rqc.compiler.commands.parameters import Json
from rqc.compiler.console import result_on_stdout
from rqc.runtime.inspection import size_text


def build(
    engine: Annotated[Path, typer.Argument(metavar="{ENGINE}", help="An engine compiled for TensorRT.")],
    target: Annotated[str, typer.Option(help="tensorrt-rtx, or tensorrt on the GPU that the plan is for.")],
    sm: Annotated[
        str | None, typer.Option(help="Compute capabilities, tensorrt-rtx only.  [the engine's, or 80,86,89,120]")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(metavar="SHAPES", help="batch/prompt/context, min:opt:max or one number each.  [the engine's]"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="ENGINE", help="Another file.  [default: the same]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Add a TensorRT plan to an engine; on the device, the base install and TensorRT are enough."""
    from rqc.compiler.progress import Steps
    from rqc.runtime.add_plan import add_plan

    with result_on_stdout() as emit, Steps() as progress:
        report = add_plan(
            engine, target=target, sm=sm, profile=profile, output=output, progress=progress.advance
        ).to_json()
        plan = f"{report['plan']['name']}, {size_text(report['plan_bytes'])}"
        text = f"engine        {report['engine']}\nplan          {plan}"
        emit(report, text, as_json)
