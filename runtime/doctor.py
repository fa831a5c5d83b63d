"""What this machine is and what rqc can do on it: versions, instruction set, providers, what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rqc.runtime.errors import ResourceError

BASE = ("numpy", "onnxruntime", "tokenizers", "jinja2", "typer", "rich")
COMPILE = ("torch", "transformers", "peft", "safetensors", "onnx", "onnx-ir", "mobius-onnx", "ml-dtypes", "gguf")
"""Packages of the extra `compile`, as pyproject.toml lists them."""
_MODULES = {"onnx-ir": "onnx_ir", "mobius-onnx": "mobius", "ml-dtypes": "ml_dtypes"}
_EXTENSIONS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("neon", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)
"""Instruction set extensions that matter to a quantized matrix product, by the names of /proc/cpuinfo."""


def missing(packages: Iterable[str]) -> list[str]:
    """Those of the packages whose module is not installed; nothing is imported."""
    return [name for name in packages if importlib.util.find_spec(_MODULES.get(name, name)) is None]


def can_compile() -> bool:
    """Whether the extra `compile` is installed on a Python that it runs on."""
    return sys.version_info >= (3, 11) and not missing(COMPILE)


def require_compile() -> None:
    """Raise ResourceError, naming what is missing, where the extra `compile` is not installed."""
    if sys.version_info < (3, 11):
        raise ResourceError(
            f"compiling needs Python 3.11 or later, this is {platform.python_version()}",
            hint="compile elsewhere: this Python runs the engine",
        )
    if absent := missing(COMPILE):
        raise ResourceError(
            f"compiling needs packages that are not installed: {', '.join(absent)}", hint="pip install 'rqc[compile]'"
        )


def diagnose() -> dict[str, Any]:
    """Everything that `rqc doctor` tells, as plain values."""
    return {
        "rqc": version("rqc"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "instructions": instructions(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
        "packages": {name: version(name) for name in (*BASE, *COMPILE)},
        "providers": _providers(),
        "run": {"onnx": not missing(BASE)},
        "compile": {"onnx": can_compile()},
        "missing": missing((*BASE, *COMPILE)),
        **_gpu(),
    }


def to_text(report: dict[str, Any]) -> str:
    """`diagnose`'s report for a person."""
    memory = report["memory_bytes"]
    rows = [
        ("rqc", report["rqc"]),
        ("python", f"{report['python']} on {report['platform']}"),
        ("cpu", f"{report['cpu']}, {report['cpus']} usable"),
        ("instructions", " ".join(report["instructions"]) or "none of those that matter are reported"),
        ("memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB"),
        ("providers", ", ".join(report["providers"]) or "ONNX Runtime is not installed"),
        *((name, value or "not installed") for name, value in report["packages"].items()),
        ("run engines", "onnx: yes" if report["run"]["onnx"] else "onnx: no, reinstall rqc"),
        ("compile", f"onnx: {_compile_verdict(report)}"),
        *_gpu_rows(report),
    ]
    return "\n".join(f"{name:<14}{value}" for name, value in rows)


def version(package: str) -> str | None:
    """The installed version, None without one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def instructions() -> list[str]:
    """The extensions of `_EXTENSIONS` that the kernel reports; [] where there is no /proc/cpuinfo."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    flags = set(found.group(1).split()) if found else set()
    return [name for name in _EXTENSIONS if name in flags]


def _compile_verdict(report: dict[str, Any]) -> str:
    if report["compile"]["onnx"]:
        return "yes"
    return "no, pip install 'rqc[compile]'" if sys.version_info >= (3, 11) else "no, that needs Python 3.11"


def _gpu() -> dict[str, Any]:
    """The GPU and the modules that run plans on it; nothing where numpy is missing, which is told elsewhere."""
    if missing(("numpy",)):
        return {}
    from rqc.runtime.backends.gpu_report import report_gpu

    return report_gpu()


def _gpu_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    if "gpu" not in report:
        return []
    from rqc.runtime.backends.gpu_report import to_rows

    return to_rows(report)


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def _memory() -> int | None:
    """Bytes of physical memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX, or not told
        return None


def _providers() -> list[str]:
    if missing(("onnxruntime",)):
        return []
    import onnxruntime

    return list(onnxruntime.get_available_providers())
