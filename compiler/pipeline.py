"""The compiler: model_dir → engine.plan. What it does to the graph is the list in passlist.py."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from rqc.compiler import manifest as manifests
from rqc.compiler.adapters.merge import Merge
from rqc.compiler.adapters.reading import open_adapter, survival_of
from rqc.compiler.calibration.calibrated import (
    calibrated,
    calibrates,
    calibration_need,
    reads_text,
    tell_unread,
)
from rqc.compiler.calibration.clips import searched_clips
from rqc.compiler.calibration.compensation import check_beside, expected, said_of
from rqc.compiler.calibration.findings import Findings
from rqc.compiler.calibration.frames import Choice, choose
from rqc.compiler.calibration.layer_widths import measured_widths, with_widths
from rqc.compiler.calibration.methods import with_method
from rqc.compiler.calibration.ranges import ranges_on_text, unmeasured
from rqc.compiler.importer import Imported, import_model
from rqc.compiler.instruments import Instruments, PassRecord, Progress, Silent
from rqc.compiler.model_text import hash_of
from rqc.compiler.passlist import passes_of
from rqc.compiler.plan import write_engine
from rqc.compiler.recipe import Recipe
from rqc.compiler.sizes import Estimate, check_memory, estimate
from rqc.compiler.targets.guards import check_graph
from rqc.compiler.targets.settle import narrowed, settled
from rqc.models.checkpoint import model_directory
from rqc.models.quantized import forget
from rqc.models.rotation import Rotation
from rqc.runtime.build import build_plan, require_builder
from rqc.runtime.container import EngineFile
from rqc.runtime.engine_writer import EngineSummary, check_target
from rqc.runtime.errors import InputError
from rqc.runtime.plans import with_plans
from rqc.runtime.replace_file import folder_beside

HERE = ("adapter", "rotation", "calibration", "device", "max_memory")
"""Options that are of this host: paths, of which engines know what was there by its hash, its GPU and its memory."""


@dataclass(frozen=True)
class CompileReport:
    """What a compile did. Sizes in bytes, times in seconds."""

    engine: str | None
    size_bytes: int
    seconds: float
    peak_rss_bytes: int
    passes: list[PassRecord]
    rotation: dict[str, Any]
    sha256: str | None = None
    estimate: Estimate | None = None
    survival: dict[str, float] | None = None
    widths: dict[str, Any] | None = None
    parity: dict[str, Any] | None = field(default=None)

    def to_json(self) -> dict[str, Any]:
        """The report with the keys of `rqc compile --json`."""
        return {
            "engine": self.engine,
            "size_bytes": self.size_bytes,
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "passes": [record.to_json() for record in self.passes],
            "rotation": self.rotation,
            "survival": self.survival,
            **({} if self.widths is None else {"widths": self.widths}),
            "parity": self.parity,
            "sha256": self.sha256,
            "estimate": None if self.estimate is None else self.estimate.to_json(),
        }


def compile_model(
    model_dir: str | Path,
    output: str | Path | None,
    *,
    recipe: Recipe | None = None,
    verify_each: bool = False,
    dump_ir: Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CompileReport:
    """Compile a Hugging Face model directory into an engine.

    With `dry_run` nothing is read but headers and nothing is written: the report holds passes and estimates. Raises an
    RqcError: unusable input, an option that does not fit the model or the adapter, a pass that fails its check, an
    adapter that rounding would take away, no memory or disk.
    """
    started = time.perf_counter()
    recipe = recipe or Recipe()
    if output is not None:
        check_target(output)  # before the minutes that it may take to choose a frame
    instruments = Instruments(verify_each, dump_ir, progress or Silent())
    text = hash_of(recipe.calibration, model_directory(model_dir))  # must be sound, whether it is looked at or not
    imported, recipe, merge = _opened(model_dir, recipe, instruments.progress)
    read = text if reads_text(recipe) else None
    if verify_each and recipe.dtype == "bf16":
        raise InputError("--verify-each with --dtype bf16, which ONNX Runtime does not compute", hint="--dtype fp16")
    if recipe.builds and not dry_run:
        require_builder(recipe.target)  # before the minutes of folding
    told = instruments.progress
    recipe, choice, widths = _decided(recipe, imported, merge, told, measure=not dry_run)
    model, description, rotation = imported.model, imported.description, choice.rotation
    findings = expected(recipe, description) if dry_run else calibrated(recipe, imported, rotation, merge, told)
    measure = unmeasured if dry_run else ranges_on_text(recipe, imported, told)
    instruments.run(model, passes_of(recipe, description, rotation, merge, measure, findings))
    parameters, companions = manifests.parameter_count(imported), manifests.companion_bytes(imported)
    calibrating = calibration_need(recipe, imported) if dry_run else 0
    estimated = estimate(model, parameters, companions, builds=recipe.builds, calibrating=calibrating)
    check_memory(estimated, recipe.max_memory, _way_to_less(recipe, rotation))
    if recipe.target != "onnx":
        check_graph(model, recipe.target, recipe.sm)
    summary = survival = None
    if not dry_run:
        if output is None:
            raise ValueError("a compile needs an output path unless it is a dry run")
        survival = None if merge is None else survival_of(model, merge, recipe, rotation, told)
        made = _Made(imported, model, recipe, choice, widths, findings, merge, survival, read)
        summary = _write(Path(output), made, told)
    return CompileReport(
        engine=None if dry_run else str(output),
        size_bytes=estimated.size_bytes if summary is None else summary.size_bytes,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=_peak(builds=recipe.builds),
        passes=instruments.records,
        rotation=choice.said,
        sha256=None if summary is None else summary.sha256,
        estimate=estimated,
        survival=survival,
        widths=widths,
    )


def _opened(model_dir: str | Path, recipe: Recipe, progress: Progress) -> tuple[Imported, Recipe, Merge | None]:
    """The model and its adapters, and the recipe with all that follows from them alone; no weight is read."""
    imported = import_model(model_dir)
    if recipe.rotation_file is not None:
        recipe.rotation_file.check_model(imported.checkpoint.fingerprint())
    manifests.check_files(imported)
    asked, merge = open_adapter(recipe, imported, progress)
    recipe = settled(asked, imported.description.architecture, merge)
    if not asked.sm and (why := narrowed(recipe)) is not None:
        progress.line(why)
    check_beside(recipe, merge)
    recipe = with_widths(with_method(recipe, merge, progress), imported)
    tell_unread(recipe, progress)
    return imported, recipe, merge


def _decided(
    recipe: Recipe, imported: Imported, merge: Merge | None, progress: Progress, *, measure: bool
) -> tuple[Recipe, Choice, dict[str, Any] | None]:
    """The recipe with all that is chosen by measurement, in this order: frame and method, the bits of each linear,
    clips; how frame and method were, and what a report says of the bits."""
    choice = choose(recipe, imported, progress, merge, measure=measure)
    rotation, recipe = choice.rotation, replace(recipe, method=choice.method)
    recipe, widths = measured_widths(recipe, imported, rotation, merge, progress, measure=measure)
    recipe = searched_clips(recipe, imported, rotation, merge, progress, measure=measure)
    return recipe, choice, widths


def _way_to_less(recipe: Recipe, rotation: Rotation) -> str:
    """What would lower the peak memory of a compile."""
    if recipe.builds:
        return "--portable here, and `rqc build` where there is more"
    ways = ["lower --calibration-length and --calibration-samples"] if calibrates(recipe) else []
    ways += ["leave r1 out: folds that mix rows need a whole matrix in float64"] if "r1" in rotation.sites else []
    return ", or ".join(ways) or "compile where there is more"


def _peak(*, builds: bool) -> int:
    """What this process held at most, and the builder of a plan: an upper bound of what both held at a time."""
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN) if builds else (resource.RUSAGE_SELF,)
    return sum(resource.getrusage(who).ru_maxrss for who in processes) * 1024


@dataclass(frozen=True, eq=False)
class _Made:
    """A lowered model with everything that its engine says of it."""

    imported: Imported
    model: ir.Model
    recipe: Recipe
    choice: Choice
    widths: dict[str, Any] | None
    findings: Findings | None
    merge: Merge | None
    survival: dict[str, float] | None
    text: str | None


def _write(output: Path, made: _Made, progress: Progress) -> EngineSummary:
    if not made.recipe.builds:
        return _write_onnx(output, made, progress)
    with folder_beside(check_target(output)) as folder:
        part = Path(folder) / "engine.plan"
        _write_onnx(part, made, progress)
        progress.line(f"building a {made.recipe.target} plan")
        with EngineFile.open(part) as engine:
            plan = build_plan(engine, made.recipe.target, made.recipe.sm, made.recipe.profile, progress.advance)
            return with_plans(engine, output, [plan])


def _write_onnx(output: Path, made: _Made, progress: Progress) -> EngineSummary:
    adapter = None if made.merge is None else made.merge.record(made.survival or {})
    beside = said_of(made.recipe, made.findings)
    manifest = manifests.manifest_of(made.imported, made.model, made.recipe, made.choice.rotation, adapter, beside)
    recipe = {name: value for name, value in made.recipe.to_json().items() if name not in HERE}
    calibration = None if made.findings is None else made.findings.to_json()
    report: dict[str, Any] = {
        "rotation": made.choice.said,
        "recipe": recipe,
        "adapter": adapter,
        "survival": made.survival,
    }
    report |= {"text": made.text} if made.text else {}
    report |= {"calibration": calibration} if calibration else {}
    report |= {"widths": made.widths} if made.widths else {}
    files = manifests.engine_files(made.imported, report, made.choice.rotation)
    try:
        return write_engine(output, made.model, manifest, files, progress=progress.advance)
    finally:
        forget()
