"""`rqc.compile`: options by name, as the command line has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rqc.compiler.calibration.device import on_device
from rqc.compiler.instruments import Progress
from rqc.compiler.pipeline import CompileReport, compile_model
from rqc.compiler.recipe import Recipe
from rqc.runtime.doctor import require_compile
from rqc.runtime.errors import InputError


def compile_engine(
    model_dir: str | Path,
    engine: str | Path | None,
    *,
    recipe: str | Path | None = None,
    verify: bool = False,
    verify_each: bool = False,
    dump_ir: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> CompileReport:
    """Compile a Hugging Face model directory into an engine.

    options: the fields of `Recipe` by name (scheme="w4a8", rotate="r1,r4", ...), over those of the TOML file `recipe`.
    verify: compare the engine with PyTorch afterwards; the result is the report's `parity`. verify_each: run the graph
    around each pass and fail one that drifts. dump_ir: a directory for the graph after each pass. dry_run: plan and
    estimate, write nothing. Raises an RqcError.
    """
    require_compile()
    made = Recipe.layered(None if recipe is None else Path(recipe), options)
    if engine is None and not dry_run:
        raise InputError("no engine to write is named", hint="-o ENGINE, or --dry-run")
    if verify and dry_run:
        raise InputError("verify needs an engine, a dry run writes none", hint="leave one of them out")
    if dry_run and (verify_each or dump_ir is not None):
        raise InputError("a dry run reads no weights, and --verify-each and --dump-ir need them", hint="leave one out")
    dump = None if dump_ir is None else Path(dump_ir)
    with on_device(made.device):
        report = compile_model(
            model_dir, engine, recipe=made, verify_each=verify_each, dump_ir=dump, dry_run=dry_run, progress=progress
        )
    if not verify or engine is None:
        return report
    from rqc.compiler.verify.engine import verify_engine  # torch: seconds to import, and only here

    if progress is not None:
        progress.line("verifying against PyTorch")
    return replace(report, parity=verify_engine(engine, model_dir, adapter=made.adapter).to_json())
