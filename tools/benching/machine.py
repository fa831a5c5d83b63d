"""The machine that a figure belongs to, and how busy others kept it meanwhile."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

from rqc.runtime.doctor import diagnose

_STAT = Path("/proc/stat")


def describe() -> dict[str, Any]:
    """Processor, its instructions, cores, system, Python and the project's packages that compute."""
    found = diagnose()
    return {
        "cpu": found["cpu"],
        "instructions": found["instructions"],
        "cpus": found["cpus"],
        "platform": platform.platform(),
        "python": found["python"],
        "packages": {name: found["packages"][name] for name in ("numpy", "onnxruntime")},
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
    }


def load_average() -> float:
    """Runnable processes over the last minute, this benchmark's own among them."""
    return os.getloadavg()[0]


def busy_seconds() -> float | None:
    """CPU seconds that all processes have used since boot, and those stolen; None where the system does not tell."""
    if not _STAT.is_file():
        return None
    user, nice, system, _idle, _wait, irq, soft, stolen = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK")
