"""The backend of an engine on this machine: its TensorRT plan where one runs, ONNX Runtime elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rqc.runtime.backends.base import Backend
from rqc.runtime.backends.ort import OrtBackend
from rqc.runtime.backends.plan_choice import FLAVOURS, Chosen, Plan, choose, plans_of
from rqc.runtime.backends.tensorrt import TensorrtBackend
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import InputError, TargetError

BACKENDS = ("auto", "onnxruntime", "tensorrt")
_RUNS_ON_CPU = "backend onnxruntime runs its ONNX part"


@dataclass(frozen=True)
class Opened:
    """A backend, its name, and one sentence why it is not the plan's, where the engine has or wants one."""

    backend: Backend
    name: str
    fallback_reason: str | None = None


def open_backend(
    file: EngineFile,
    wanted: str = "auto",
    *,
    threads: int | None = None,
    spin: bool = True,
) -> Opened:
    """The backend `wanted` for an engine; auto is the first plan that runs here, or else ONNX Runtime.

    Raises TargetError where the one that is wanted cannot run, and where none can.
    """
    if wanted not in BACKENDS:
        raise InputError(f"backend is {wanted!r}", hint=f"backend is one of {', '.join(BACKENDS)}")
    manifest = file.manifest
    target = manifest.get("target", "onnx")
    if target != "onnx" and target not in FLAVOURS:
        raise TargetError(
            f"{file.path} was built for {target}, which this runtime does not run", hint="update rqc on this device"
        )
    plans = plans_of(manifest)
    if wanted == "onnxruntime" or (wanted == "auto" and target == "onnx" and not plans):
        return Opened(_onnxruntime(file, threads, spin, None), "onnxruntime")
    reason = _no_plan(manifest, str(target))
    if plans:
        found = choose(plans)
        if isinstance(found, Chosen):
            try:
                return Opened(TensorrtBackend(file, found, threads=threads), "tensorrt")
            except TargetError as error:
                plans, found = [found.plan], [error.message]
        reason = "; ".join(map(_does_not_run, found, plans))
    if wanted == "tensorrt":
        on_cpu = plans and _no_kernels(manifest) is None
        raise TargetError(reason, hint=_RUNS_ON_CPU if on_cpu else _build_hint(manifest))
    return Opened(
        _onnxruntime(file, threads, spin, reason), "onnxruntime", f"{reason}; ONNX Runtime runs its ONNX part"
    )


def _onnxruntime(file: EngineFile, threads: int | None, spin: bool, reason: str | None) -> OrtBackend:
    """Raises TargetError for graphs that ONNX Runtime does not compute on a CPU."""
    if (found := _no_kernels(file.manifest)) is not None:
        said, way = found
        why = f"; {reason}" if reason else ""
        raise TargetError(f"{said}, for which ONNX Runtime has no kernels on a CPU{why}", hint=way)
    return OrtBackend(file, threads=threads, spin=spin)


def _no_kernels(manifest: Mapping[str, Any]) -> tuple[str, str] | None:
    """(what of an engine ONNX Runtime has no kernels for, the way out), or None."""
    if manifest.get("dtype") == "bf16":
        return "this engine computes in bf16", "compile with --dtype fp16 to run on a CPU as well"
    if manifest.get("weights") == "nvfp4":
        scheme = manifest.get("scheme")
        way = "a GPU of SM 120 or later runs its plan; compile with --scheme w4a16 to run on a CPU as well"
        return f"this engine's weights are 4-bit floats ({scheme})", way
    return None


def _does_not_run(why: str, plan: Plan) -> str:
    return f"{why}: this engine's {plan.label} does not run here"


def _no_plan(manifest: Mapping[str, Any], target: str) -> str:
    return f"this engine's {FLAVOURS[target][1]} plan is pending" if target in FLAVOURS else "this engine has no plan"


def _build_hint(manifest: Mapping[str, Any]) -> str:
    target = manifest.get("target", "onnx")
    if target in FLAVOURS:
        return f"rqc build ENGINE --target {target}"
    return "compile with --target tensorrt-rtx"
