"""`rqc.export`: a checkpoint that other runtimes read, of an engine or of a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rqc.compiler.export.checkpoint import ExportReport
from rqc.compiler.export.from_engine import export_engine
from rqc.compiler.export.from_model import export_model
from rqc.compiler.instruments import Progress, Silent
from rqc.compiler.option_values import near_miss, one_of
from rqc.models.checkpoint import GGUF
from rqc.runtime.directories import new_directory
from rqc.runtime.errors import InputError

FORMATS = ("gptq",)
OPTIONS = (
    *("group_size", "rotate", "rotation_seed", "clip", "method"),
    *("calibration", "calibration_samples", "calibration_length", "device"),
    *("adapter", "min_survival"),
)
"""Those of a compile that a checkpoint leaves open."""


def export(
    source: str | Path,
    output: str | Path,
    *,
    format: str = "gptq",
    progress: Progress | None = None,
    **options: Any,
) -> ExportReport:
    """Write a Hugging Face checkpoint in GPTQ's layout into the new directory `output`.

    source: an engine, whose codes it then has bit for bit; or a model directory (or GGUF file), which is rounded to 4
    bits in symmetric groups as `options` say, by the names and with the meaning of a compile's: group_size (128),
    rotate (none, or a list of r1 and r2), rotation_seed, clip, method, calibration, calibration_samples,
    calibration_length, device, adapter, min_survival; None is the default. Raises an RqcError for what the format
    cannot hold and for options beside an engine.
    """
    one_of("format", format, FORMATS, InputError)
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := next((name for name in given if name not in OPTIONS), None):
        raise InputError(f"unknown option {unknown!r} of an export", hint=near_miss(unknown, OPTIONS))
    path, target = Path(source), new_directory(output)
    if not path.is_file() or path.suffix == GGUF:
        return export_model(path, target, given, progress or Silent())
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(
            f"{flags} with the engine {path}, whose codes are what they are",
            hint="leave it out, or rqc export MODEL_DIR",
        )
    return export_engine(path, target)
