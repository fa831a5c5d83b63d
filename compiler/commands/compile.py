"""`rqc compile`: parsing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rqc.compiler.commands.parameters import (
    ActivationSymmetric,
    CalibrationDevice,
    Clip,
    Hadamard,
    Json,
    Length,
    Method,
    MinSurvival,
    ModelDir,
    Samples,
    TextFile,
)
from rqc.compiler.commands.verify import fail_gates
from rqc.compiler.console import result_on_stdout
from rqc.runtime import doctor as doctors


def compile_(
    context: typer.Context,
    model_dir: ModelDir,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="ENGINE", help="The engine to write.", show_default=False)
    ] = None,
    target: Annotated[str | None, typer.Option(help="onnx tensorrt-rtx tensorrt.  [default: onnx]")] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="fp32 fp16 w8a16 w8a8 w6a6 w4a16 w4a8 w4a4 w3a16 w2a16; for TensorRT also fp8a16 nvfp4a16.  "
            "[default: w4a8]"
        ),
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="16 32 64 128 256, -1 per channel.  [default: 32]")] = None,
    bits_budget: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            help="With w4a16 w4a8 w4a4: the mean of all linears, each of 2 4 8 bits by how sensitive it is.",
        ),
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Grids with or without zero points.  [symmetric]")
    ] = None,
    clip: Clip = None,
    method: Method = None,
    compensate: Annotated[
        str | None,
        typer.Option(help="none; eora or loftq, a low-rank branch for rounding's error.  [default: none]"),
    ] = None,
    compensate_rank: Annotated[int | None, typer.Option(help="Rank of every branch.  [default: 32]")] = None,
    compensate_budget: Annotated[
        float | None,
        typer.Option(metavar="BITS", help="Bits of all branches for each weight: ranks where they take off most."),
    ] = None,
    sparsity: Annotated[str | None, typer.Option(help="none or 2:4.  [default: none]")] = None,
    prune: Annotated[
        str | None, typer.Option(help="With --sparsity: magnitude, or wanda, by what is read.  [default: wanda]")
    ] = None,
    activation_symmetric: ActivationSymmetric = None,
    activation_clip: Annotated[
        str | None,
        typer.Option(
            metavar="RATIO|auto", help="Clip their range to this share, or search it on the text.  [default: 1.0]"
        ),
    ] = None,
    rotate: Annotated[
        str | None, typer.Option(help="auto, none, or a comma list of r1 r2 r3 r4.  [default: auto, or the adapter's]")
    ] = None,
    rotation_seed: Annotated[int | None, typer.Option(help="Seed of the signs.  [default: 0]")] = None,
    hadamard: Hadamard = None,
    rotation_file: Annotated[
        Path | None, typer.Option("--rotation", metavar="FILE", help="What `rqc rotate` has learned.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="A PEFT directory to merge; it brings its basis and grid along. Repeated: their sum, or with names, "
            "one that `run --adapter NAME` switches on.",
        ),
    ] = None,
    merge: Annotated[str | None, typer.Option(help="auto fold zero-point branch.  [default: auto]")] = None,
    min_survival: MinSurvival = None,
    kv_cache: Annotated[
        str | None, typer.Option(help="Keys and values in float int8 int4; target onnx.  [default: float]")
    ] = None,
    tied: Annotated[
        str | None, typer.Option(help="keep: one table for embedding and head; untie: two.  [default: keep]")
    ] = None,
    embedding_bits: Annotated[
        int | None, typer.Option(help="4 8 16 32.  [default: 8; the scheme's own type for fp32 and fp16]")
    ] = None,
    head_bits: Annotated[
        int | None, typer.Option(help="As --embedding-bits; tied and kept, one value for both.")
    ] = None,
    max_memory: Annotated[str | None, typer.Option(help="Such as 4GiB: stay under it or fail before starting.")] = None,
    calibration: TextFile = None,
    calibration_samples: Samples = None,
    calibration_length: Length = None,
    device: CalibrationDevice = None,
    dtype: Annotated[
        str | None, typer.Option(help="Floats of a TensorRT target: fp16 bf16 fp32.  [default: fp16]")
    ] = None,
    sm: Annotated[
        str | None,
        typer.Option(
            help="Compute capabilities for tensorrt-rtx.  [default: 80,86,89,120; fp8a16 from 89, nvfp4a16 from 120 on]"
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(metavar="SHAPES", help="Of TensorRT: batch/prompt/context, min:opt:max or one number each."),
    ] = None,
    portable: Annotated[
        bool | None,
        typer.Option(
            "--portable/--no-portable", help="Write the ONNX part of a TensorRT engine now; `rqc build` on the device."
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML file of these options; flags override it.")] = None,
    verify_after: Annotated[bool, typer.Option("--verify", help="Run `rqc verify` afterwards.")] = False,
    verify_each: Annotated[bool, typer.Option(help="Run the graph around each pass; fail one that drifts.")] = False,
    dump_ir: Annotated[Path | None, typer.Option(help="Write the graph after each pass into this directory.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Plan and estimate only; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Compile a model directory, and an adapter if there is one, into one engine.plan."""
    doctors.require_compile()
    from rqc.compiler.api import compile_engine
    from rqc.compiler.progress import Steps
    from rqc.compiler.recipe import Recipe
    from rqc.compiler.reports import compile_text, failed_gates

    # the other flags are the fields of a recipe, by name
    options = {name: value for name, value in context.params.items() if name in Recipe.__dataclass_fields__}
    options["adapter"] = adapter or None
    with result_on_stdout() as emit, Steps() as progress:
        value = compile_engine(
            model_dir,
            output,
            recipe=recipe,
            verify=verify_after,
            verify_each=verify_each,
            dump_ir=dump_ir,
            dry_run=dry_run,
            progress=progress,
            **options,
        ).to_json()
        emit(value, compile_text(value), as_json)
    if value["parity"] and not value["parity"]["passed"]:
        fail_gates(failed_gates(value["parity"]), as_json)
