"""`rqc rotate`: parsing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rqc.compiler.commands.parameters import ActivationSymmetric, Hadamard, Json, ModelDir, TextFile
from rqc.compiler.console import result_on_stdout
from rqc.runtime import doctor as doctors


def rotate(
    context: typer.Context,
    model_dir: ModelDir,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="The rotation.safetensors to write.", show_default=False),
    ],
    scheme: Annotated[
        str | None, typer.Option(help="What the engine will round, as in compile.  [default: w4a4]")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="float, for GPTQ comes after; rtn, rounded to nearest too.  [default: float]")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="16 32 64 128 256, -1 per channel.  [default: 32]")] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Of --weights rtn.  [symmetric]")
    ] = None,
    activation_symmetric: ActivationSymmetric = None,
    activation_clip: Annotated[
        float | None, typer.Option(help="Clip their range to this share.  [default: 1.0]")
    ] = None,
    kv_cache: Annotated[str | None, typer.Option(help="Keys and values in float int4.  [default: float]")] = None,
    rotate: Annotated[
        str | None, typer.Option(help="r1, r2 or both, which are learned, and r3 r4.  [default: r1,r2,r4]")
    ] = None,
    rotation_seed: Annotated[int | None, typer.Option(help="Seed of the signs at the start.  [default: 0]")] = None,
    hadamard: Hadamard = None,
    loss: Annotated[
        str | None,
        typer.Option(help="kl, from what the model says in floats; ce, of the next token.  [default: kl]"),
    ] = None,
    calibration: TextFile = None,
    steps: Annotated[int | None, typer.Option(help="[default: 100]")] = None,
    lr: Annotated[
        float | None, typer.Option(help="How far a step turns, up to 1; it follows a cosine.  [default: 0.2]")
    ] = None,
    momentum: Annotated[float | None, typer.Option(help="[default: 0.9]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows of a step.  [default: 1]")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a window.  [default: 1024]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the text.  [default: 0]")] = None,
    device: Annotated[str | None, typer.Option(help="auto cpu cuda.  [default: auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 bf16: what products are computed in.  [fp32]")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps after which the state is kept.  [default: 10]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run into FILE was stopped.")] = False,
    as_json: Json = False,
) -> None:
    """Learn R1 and R2 for what an engine rounds; compile --rotation FILE takes them."""
    doctors.require_compile()
    from rqc.compiler.progress import Steps
    from rqc.compiler.rotate.run import rotate as learn
    from rqc.compiler.rotate.settings import RotateSettings

    options = {name: value for name, value in context.params.items() if name in RotateSettings.__dataclass_fields__}
    with result_on_stdout() as emit, Steps() as progress:
        report = learn(model_dir, output, resume=resume, progress=progress, **options)
        emit(report.to_json(), report.to_text(), as_json)
