"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EnginePath = Annotated[Path, typer.Argument(metavar="ENGINE", help="An engine.plan.", show_default=False)]
ModelDir = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Threads = Annotated[int | None, typer.Option(help="Threads per operator; the physical cores by default.")]
BackendName = Annotated[str, typer.Option("--backend", help="auto onnxruntime tensorrt.")]
TextFile = Annotated[Path | None, typer.Option(help="Text, or data as of finetune; a text ships with rqc.")]
Samples = Annotated[int | None, typer.Option(help="Windows of text.  [default: 64]")]
Length = Annotated[int | None, typer.Option(help="Tokens of a window.  [default: 512]")]
CalibrationDevice = Annotated[str | None, typer.Option(help="cpu, or cuda: what calibration runs on.  [default: cpu]")]
ActivationSymmetric = Annotated[
    bool | None,
    typer.Option(
        "--activation-symmetric/--activation-asymmetric",
        help="Activations per token with or without zero points.  [symmetric]",
    ),
]
Hadamard = Annotated[str | None, typer.Option(help="full or block.  [default: full]")]
Method = Annotated[
    str | None, typer.Option(help="rtn, rounding to nearest; gptq, fitted to text; auto.  [default: rtn]")
]
Clip = Annotated[str | None, typer.Option(help="none or mse.  [default: mse]")]
MinSurvival = Annotated[
    float | None, typer.Option(help="Fail where rounding leaves less of the adapter in a linear.  [default: 0.5]")
]
