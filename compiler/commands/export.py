"""`rqc export`: a checkpoint that other runtimes read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rqc.compiler.commands.parameters import (
    CalibrationDevice,
    Clip,
    Json,
    Length,
    Method,
    MinSurvival,
    Samples,
    TextFile,
)
from rqc.compiler.console import result_on_stdout
from rqc.runtime import doctor as doctors
from rqc.runtime.inspection import size_text


def export(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="ENGINE|MODEL_DIR", help="An engine.plan, as it is; or a model, with the options below."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new directory.", show_default=False)],
    format: Annotated[str, typer.Option(help="gptq: 4 bits in symmetric groups.")] = "gptq",
    group_size: Annotated[int | None, typer.Option(help="16 32 64 128 256, -1 per channel.  [default: 128]")] = None,
    rotate: Annotated[
        str | None,
        typer.Option(help="none, or a comma list of r1 r2; R1 unties embedding and head.  [default: none]"),
    ] = None,
    rotation_seed: Annotated[int | None, typer.Option(help="Seed of the signs.  [default: 0]")] = None,
    clip: Clip = None,
    method: Method = None,
    calibration: TextFile = None,
    calibration_samples: Samples = None,
    calibration_length: Length = None,
    device: CalibrationDevice = None,
    adapter: Annotated[list[str] | None, typer.Option(metavar="DIR", help="A PEFT directory to fold in first.")] = None,
    min_survival: MinSurvival = None,
    as_json: Json = False,
) -> None:
    """Write an engine's codes, or a model rounded to 4 bits, as a Hugging Face checkpoint that other runtimes read."""
    doctors.require_compile()
    from rqc.compiler.export.run import OPTIONS
    from rqc.compiler.export.run import export as export_checkpoint
    from rqc.compiler.progress import Steps

    options = {name: value for name, value in context.params.items() if name in OPTIONS}
    options["adapter"] = adapter or None
    with result_on_stdout() as emit, Steps() as progress:
        report = export_checkpoint(source, output, format=format, progress=progress, **options).to_json()
        emit(report, _text(report), as_json)


def _text(report: dict[str, Any]) -> str:
    rows = [("directory", report["directory"]), ("linears", f"{report['linears']} in 4 bits")]
    if report["survival"]:
        rows.append(("survival", f"{min(report['survival'].values()):g} in the linear that keeps least"))
    if report["scale_error"]:
        rows.append(("scales", f"float16: they move a linear's weights by {report['scale_error']:.1e} at most"))
    rows += [("note", note) for note in report["notes"]]
    rows.append(("size", size_text(report["size_bytes"])))
    return "\n".join(f"{name:<14}{value}" for name, value in rows)
