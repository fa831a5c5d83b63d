"""`rqc finetune`: parsing only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from rqc.compiler.commands.parameters import Clip, Hadamard, Json, ModelDir
from rqc.compiler.console import result_on_stdout
from rqc.runtime import doctor as doctors


def finetune(
    context: typer.Context,
    model_dir: ModelDir,
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="Records in .jsonl or .json, or a .txt.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The adapter to write.", show_default=False)
    ],
    adapter_type: Annotated[str | None, typer.Option(help="lora dora qalora qbara qahira.  [default: lora]")] = None,
    rank: Annotated[int | None, typer.Option(help="[default: 16]")] = None,
    alpha: Annotated[float | None, typer.Option(help="The update counts alpha / rank.  [default: 16]")] = None,
    dropout: Annotated[float | None, typer.Option(help="In front of the adapters.  [default: 0]")] = None,
    target_modules: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Such as q_proj,v_proj; all linears of the blocks by default.")
    ] = None,
    rslora: Annotated[bool | None, typer.Option("--rslora", help="alpha / sqrt(rank), as RoRA too.")] = None,
    pool: Annotated[
        int | None, typer.Option(help="Inputs that share a column: the group size; of qbara 2.", show_default=False)
    ] = None,
    repeat: Annotated[int | None, typer.Option(help="Outputs that share a row of qahira.  [default: 1]")] = None,
    init: Annotated[
        str | None, typer.Option(help="default gaussian orthogonal pissa olora mica loftq eora.  [default: default]")
    ] = None,
    loftq_iterations: Annotated[int | None, typer.Option(help="Alternations of LoftQ.  [default: 5]")] = None,
    base: Annotated[str | None, typer.Option(help="float w4 w3 w2 nf4: what is trained on.  [default: float]")] = None,
    group_size: Annotated[int | None, typer.Option(help="16 32 64 128 256, -1 per channel.  [default: 32]")] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Grids with or without zero points.  [symmetric]")
    ] = None,
    clip: Clip = None,
    activations: Annotated[
        int | None, typer.Option(help="16 8 6 4: bits that inputs are rounded to in training.  [default: 16]")
    ] = None,
    rotate: Annotated[str | None, typer.Option(help="none, or a comma list of r1 r2 r3 r4.  [default: r1,r4]")] = None,
    rotation_seed: Annotated[int | None, typer.Option(help="Seed of the signs.  [default: 0]")] = None,
    hadamard: Hadamard = None,
    rotation_file: Annotated[
        Path | None, typer.Option("--rotation", metavar="FILE", help="What `rqc rotate` has learned.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw lora-plus lora-fa lora-rite.  [default: adamw]")] = None,
    epochs: Annotated[float | None, typer.Option(help="[default: 3]")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps at most; 0: by the epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Per process and step.  [default: 8]")] = None,
    grad_accum: Annotated[int | None, typer.Option(help="Batches of one optimizer step.  [default: 1]")] = None,
    lr: Annotated[float | None, typer.Option(help="The highest rate; it follows a cosine.  [default: 1e-4]")] = None,
    warmup_ratio: Annotated[float | None, typer.Option(help="Steps in which it rises, a share.  [0.01]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="[default: 0]")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Longer gradients are cut.  [default: 1]")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens after which a record is cut.  [default: 1024]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of adapters, order and dropout.  [default: 0]")] = None,
    device: Annotated[str | None, typer.Option(help="auto cpu cuda.  [default: auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 bf16 fp16: what products are computed in.  [fp32]")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = None,
    eval_split: Annotated[float | None, typer.Option(help="Share (or number) of records to hold out.")] = None,
    eval_data: Annotated[Path | None, typer.Option(metavar="FILE", help="Records to evaluate on.")] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Steps between evaluations; after each epoch without.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints.  [default: 50]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in DIR.")] = False,
    export_plain: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write it in the model's own basis too, for any LoRA loader.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train an adapter in the rotated basis, and on the grid, of its engine."""
    doctors.require_compile()
    from rqc.compiler.finetune.run import finetune as train
    from rqc.compiler.finetune.settings import Settings
    from rqc.compiler.progress import Steps

    options = {name: value for name, value in context.params.items() if name in Settings.__dataclass_fields__}
    with result_on_stdout() as emit, Steps() as progress:
        report = train(model_dir, data, output, resume=resume, progress=progress, **options)
        if os.environ.get("RANK", "0") == "0":
            emit(report.to_json(), report.to_text(), as_json)
