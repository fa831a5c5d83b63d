"""`rqc build`: a TensorRT plan added to an engine that has its ONNX part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rqc.runtime.build import MODULES, Progress, build_plan
from rqc.runtime.capabilities import parse_sms
from rqc.runtime.container import EngineFile
from rqc.runtime.engine_writer import check_target
from rqc.runtime.errors import TargetError
from rqc.runtime.plans import with_plans
from rqc.runtime.profiles import Profile


@dataclass(frozen=True)
class BuildReport:
    """What a build added. plan: its record in the manifest. Sizes in bytes."""

    engine: str
    size_bytes: int
    plan_bytes: int
    sha256: str
    plan: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The report with the keys of `rqc build --json`."""
        return asdict(self)


def add_plan(
    engine: str | Path,
    *,
    target: str,
    sm: str | int | list[int] | None = None,
    profile: str | Profile | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Build a plan of an engine for `target` (tensorrt-rtx, or tensorrt on the GPU at hand) and add it to the file.

    sm: compute capabilities such as "86,89", for tensorrt-rtx. profile: batch/prompt/context. The engine's if None.
    output: where the engine with its plan goes, in the engine's place if None. Raises TargetError (no such builder
    here, a graph or a capability that it refuses), EngineFormatError, InputError; then the engine is as it was.
    """
    if target not in MODULES:
        raise TargetError(f"target {target!r} has no plans", hint=f"allowed: {', '.join(MODULES)}")
    shapes = Profile.parse(profile) if isinstance(profile, str) else profile
    where = Path(engine if output is None else output)
    check_target(where)
    with EngineFile.open(engine, check=True) as file:
        plan = build_plan(file, target, () if sm is None else parse_sms(sm), shapes, progress)
        summary = with_plans(file, where, [plan])
    return BuildReport(str(where), summary.size_bytes, len(plan.data), summary.sha256, plan.record)
