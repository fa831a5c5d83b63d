"""The GPU of this machine and what TensorRT can do on it, for `rqc doctor`."""

from __future__ import annotations

from typing import Any

from rqc.runtime.backends.cuda import Device, open_cuda
from rqc.runtime.backends.plan_choice import FLAVOURS, Finder, Importer, import_module
from rqc.runtime.errors import RqcError, TargetError


def report_gpu(*, importer: Importer = import_module, find_device: Finder = open_cuda) -> dict[str, Any]:
    """gpu: name and SM, or why there is none; tensorrt: of each flavour its version, and how it builds and runs."""
    device = find_device()
    return {"gpu": _gpu(device), "tensorrt": {flavour: _flavour(flavour, device, importer) for flavour in FLAVOURS}}


def to_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines for a person."""
    gpu = report["gpu"]
    rows = [("gpu", f"{gpu['name']}, SM {gpu['sm']}" if gpu["sm"] else f"none: {gpu['reason']}")]
    for flavour, found in report["tensorrt"].items():
        version = found["version"]
        does = f"{version}; builds {found['build']}; runs: {found['run']}"
        rows.append((flavour, does if version else str(found["reason"])))
    return rows


def _gpu(device: Device | str) -> dict[str, Any]:
    if isinstance(device, str):
        return {"name": None, "sm": None, "reason": device}
    try:
        return {"name": device.name, "sm": device.sm, "reason": None}
    except RqcError as error:
        return {"name": None, "sm": None, "reason": error.message}


def _flavour(flavour: str, device: Device | str, importer: Importer) -> dict[str, Any]:
    name = FLAVOURS[flavour][0]
    try:
        version = str(getattr(importer(name), "__version__", "of an unknown version"))
    except ModuleNotFoundError:
        return {"version": None, "build": None, "run": None, "reason": "not installed"}
    except TargetError as error:
        return {"version": None, "build": None, "run": None, "reason": error.message}
    gpu = _gpu(device)
    ahead = flavour == "tensorrt-rtx"  # standard TensorRT builds for the very GPU that it finds
    build = "ahead of time" if ahead else "on this GPU" if gpu["sm"] else "only where there is a GPU"
    run = f"plans of version {version} for SM {gpu['sm']}" if gpu["sm"] else gpu["reason"]
    return {"version": version, "build": build, "run": run, "reason": None}
