"""`rqc export`: a checkpoint that other runtimes read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rqc.compiler.console import result_on_stdout
from rqc.runtime import doctor as doctors
from rqc.runtime.errors import InputError
from rqc.runtime.inspection import size_text


def export(
    model_dir: Annotated[Path, typer.Argument(metavar="{MODEL_DIR}", help="A Hugging Face model directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new directory.", show_default=False)],
    format: Annotated[str, typer.Option(help="gptq: 4 bits in symmetric groups.")] = "gptq",
    group_size: Annotated[int, typer.Option(help="16 32 64 128 256, -1 per channel.")] = 128,
    rotate: Annotated[str, typer.Option(help="none, or a comma list of r1 r2; R1 unties embedding and head.")] = "none",
    rotation_seed: Annotated[int, typer.Option(help="Seed of the signs.")] = 0,
    clip: Annotated[str, typer.Option(help="none or mse.")] = "mse",
    adapter: Annotated[list[str] | None, typer.Option(metavar="DIR", help="A PEFT directory to fold in first.")] = None,
    min_survival: Annotated[
        float | None, typer.Option(help="Fail where rounding leaves less of the adapter in a linear.  [default: 0.5]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Round a model to 4 bits and write it as a Hugging Face checkpoint that other runtimes read."""
    if format != "gptq":
        raise InputError(f"format {format!r} is not available here", hint="allowed: gptq")
    doctors.require_compile()
    from rqc.compiler.export_gptq import export_gptq
    from rqc.compiler.progress import Steps

    with result_on_stdout() as emit, Steps() as progress:
        report = export_gptq(
            model_dir,
            output,
            group_size=group_size,
            rotate=rotate,
            rotation_seed=rotation_seed,
            clip=clip,
            adapter=adapter or None,
            min_survival=min_survival,
            progress=progress,
        ).to_json()
        text = f"directory     {report['directory']}\nlinears       {report['linears']} in 4 bits\n"
        if report["survival"]:
            text += f"survival      {min(report['survival'].values()):g} in the linear that keeps least\n"
        emit(report, f"{text}size          {size_text(report['size_bytes'])}", as_json)
