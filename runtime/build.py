"""Building a TensorRT plan of an engine's ONNX part: on any machine by TensorRT-RTX, on the device by TensorRT."""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rqc.runtime import build_worker
from rqc.runtime.backends.cuda import open_cuda
from rqc.runtime.capabilities import check_gpu, checked_sms, weight_kinds
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import EngineFormatError, ResourceError, TargetError
from rqc.runtime.plans import BuiltPlan
from rqc.runtime.profiles import Profile
from rqc.runtime.replace_file import explained, scratch_folder

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
Progress = Callable[[str, int, int], None]
_PORTABLE = "--portable writes the ONNX part now, for `rqc build ENGINE --target tensorrt` on the device"
_LOADING = "install the module again, with its libraries; `rqc doctor` says what loads"
_WAYS = {
    "No space left": "free space for temporary files, or name another folder for them in TMPDIR",
    "ImportError": _LOADING,
    "ModuleNotFoundError": _LOADING,
}
"""Ways out by what a builder that broke down said."""


def require_builder(flavour: str, *, compiled: bool = False) -> str:
    """The module that builds plans of that flavour. Raises TargetError naming the ways out where it is not there.

    compiled: the engine is there already, and is to get a plan.
    """
    module = MODULES[flavour]
    if importlib.util.find_spec(module) is not None:
        return module
    if flavour == "tensorrt-rtx":
        raise TargetError(
            "building for tensorrt-rtx needs the module tensorrt_rtx",
            hint="pip install 'rqc[tensorrt-rtx]', or "
            + ("`rqc build` where it is" if compiled else "--portable and `rqc build` where it is installed"),
        )
    raise TargetError(
        "--target tensorrt builds with the module tensorrt on the GPU that the plan is for, and it is not installed",
        hint=("run `rqc build` on that device, with tensorrt installed" if compiled else _PORTABLE)
        + "; or --target tensorrt-rtx, which builds on any machine",
    )


def build_plan(
    engine: EngineFile,
    flavour: str,
    sms: tuple[int, ...] = (),
    profile: Profile | None = None,
    progress: Progress | None = None,
) -> BuiltPlan:
    """A plan of the engine's graph, for compute capabilities `sms` (tensorrt-rtx) or the GPU at hand (tensorrt).

    Those that the engine was compiled for if none is named; so are the shapes if profile is None. Raises TargetError
    with the builder's reason for a graph that it refuses, ResourceError where it runs out of memory.
    """
    manifest = engine.manifest
    if manifest.get("target", "onnx") == "onnx":
        raise TargetError(
            f"{engine.path} was compiled for ONNX Runtime, whose operators TensorRT does not have",
            hint=f"rqc compile --target {flavour}",
        )
    if missing := [name for name in ("profile", "context_length") if name not in manifest]:
        raise EngineFormatError(f"{engine.path} has no {missing[0]}", hint="compile the engine again")
    profile = profile or Profile.from_json(manifest["profile"])
    profile.check(int(manifest["context_length"]))
    kinds = weight_kinds(manifest)
    if flavour == "tensorrt-rtx" and not sms:
        sms = tuple(manifest.get("sms", ()))
    sms = checked_sms(flavour, sms, kinds)
    if flavour == "tensorrt" and kinds and not isinstance(device := open_cuda(), str):
        check_gpu(device.sm, kinds)
    job = {
        "module": require_builder(flavour, compiled=True),
        "sms": list(sms),
        "profiles": [_prefill(profile), _decode(profile)],
    }
    data, version = _build(engine, job, _fixed(engine, profile), flavour, progress)
    if not sms and not isinstance(device := open_cuda(), str):
        sms = (device.sm,)  # the GPU that TensorRT built for
    name = "-".join([flavour, *map(str, sms)])
    record = {
        "name": name,
        "entry": f"device/{name}.plan",
        "flavour": flavour,
        "version": version,
        "sms": list(sms),
        "profile": profile.to_json(),
        "verified": False,
        "reason": "built without running it",
    }
    return BuiltPlan(record, data)


def _fixed(engine: EngineFile, profile: Profile) -> bytes:
    """The graph, weights in engine.plan beside it, with caches of fixed length: TensorRT updates no others in place.

    A batch of one size is fixed too.
    """
    graph = engine.graph_in(b"engine.plan")
    least, _, most = profile.batch
    sizes = {"capacity": profile.context, **({"batch": most} if least == most else {})}
    for name, size in sizes.items():
        graph = _with_dimension(graph, name.encode(), size)
    return graph


def _with_dimension(graph: bytes, name: bytes, size: int) -> bytes:
    """The serialized graph with `size` for every dimension of that name.

    A dimension (field 1 of a shape) holds its name as field 2, or its size as field 1, a varint. Both fit into the same
    bytes, since a varint may be longer than it needs to be, up to ten bytes: nothing around it has to move.
    """
    field = bytes([0x12, len(name)]) + name
    head = bytes([0x0A, len(field)])
    if head + field not in graph:
        raise TargetError(f"the graph has no open dimension {name.decode()!r}", hint="compile the engine again")
    digits = [(size >> 7 * index) & 0x7F for index in range(len(field) - 1)]
    value = bytes([0x08, *(digit | 0x80 for digit in digits[:-1]), digits[-1]])
    return graph.replace(head + field, head + value)


def _prefill(profile: Profile) -> dict[str, Any]:
    _, _, most = profile.prompt
    return {
        "batch": profile.batch,
        "input_ids": profile.prompt,
        "position_ids": profile.prompt,
        "logits_positions": (1, 1, most),
    }


def _decode(profile: Profile) -> dict[str, Any]:
    one = (1, 1, 1)
    return {"batch": profile.batch, "input_ids": one, "position_ids": one, "logits_positions": one}


def _build(
    engine: EngineFile, job: dict[str, Any], graph: bytes, flavour: str, progress: Progress | None
) -> tuple[memoryview, str]:
    """(plan, version of the builder), from a process of its own."""
    with scratch_folder("build") as folder:
        place = Path(folder)
        with explained(folder):
            (place / "engine.plan").symlink_to(engine.path)
            (place / "graph.onnx").write_bytes(graph)
            (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
        result = _run_worker(place, progress)
        engine.confirm_path()
        if "error" in result:
            raise TargetError(
                f"{flavour} does not build this engine: {' '.join(result['error'].split())}",
                hint="--target onnx runs it on ONNX Runtime",
            )
        with open(place / "plan.bin", "rb") as file:  # mapped: the pages stay when the name goes
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), result["version"]


def _run_worker(place: Path, progress: Progress | None) -> dict[str, str]:
    # -s -P -B and a fixed seed: as little as possible that could differ, see build_worker
    command = [sys.executable, "-sPB", os.path.abspath(build_worker.__file__)]
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES") if name in os.environ}
    environment = {**kept, "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
    counts = place / "progress"
    counts.write_bytes(bytes(8))
    with open(place / "told", "w+b") as told, open(place / "errors", "w+b") as errors:
        with subprocess.Popen(command, cwd=place, env=environment, stdout=told, stderr=errors) as worker:
            try:
                while _running(worker):
                    done, total = struct.unpack("ii", counts.read_bytes())
                    if progress is not None and total:
                        progress("plan", done, total)
            except BaseException:
                worker.kill()
                raise
        told.seek(0)
        errors.seek(0)
        lines, said = told.read().splitlines(), errors.read().decode(errors="replace").strip().splitlines()
    if worker.returncode != 0:
        reason = said[-1] if said else f"it ended with {worker.returncode}"
        way = next((way for word, way in _WAYS.items() if word in reason), "more memory, or a smaller --profile")
        raise ResourceError(f"the TensorRT builder broke down: {reason}", hint=way)
    result: dict[str, str] = json.loads(lines[-1])
    return result


def _running(worker: subprocess.Popen[bytes]) -> bool:
    """Whether the worker still runs, after half a second or when it ends."""
    try:
        worker.wait(0.5)
    except subprocess.TimeoutExpired:
        return True
    return False
