"""A compile that ends before its time, as a process: the old engine stays, and nothing beside it for longer than one
compile."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rqc.compiler.cli import main
from rqc.runtime.container import EngineFile

MakeTiny = Callable[..., Path]
SLOW = """
import sys, time
from rqc.compiler import cli
from rqc.runtime.replace_file import Replacement

write = Replacement.write

def slowly(self, data, place):
    time.sleep(float(sys.argv[1]))
    write(self, data, place)

Replacement.write = slowly
sys.exit(cli.main(["compile", *sys.argv[2:], "--rotate", "none", "--scheme", "fp32"]))
"""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def temporaries(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if ".rqc-" in name}


def start(model: Path, path: Path, pause: float) -> subprocess.Popen[str]:
    """A compile that waits `pause` seconds before every write, and is in the middle of them on return."""
    known = temporaries(path.parent)
    command = [sys.executable, "-c", SLOW, str(pause), str(model), "-o", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while temporaries(path.parent) <= known:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.fixture
def path(tiny_model: MakeTiny, tmp_path: Path) -> Path:
    """An engine that is to be replaced."""
    path = tmp_path / "e.plan"
    assert main(["compile", str(tiny_model("llama16")), "-o", str(path), "--rotate", "none"]) == 0
    return path


def test_an_interrupt_leaves_nothing(tiny_model: MakeTiny, path: Path) -> None:
    before = digest(path)
    process = start(tiny_model("llama16"), path, 1.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err.splitlines()[-1]) == ("", "error: interrupted")
    assert "Traceback" not in err
    assert os.listdir(path.parent) == ["e.plan"]
    assert digest(path) == before


def test_a_kill_leaves_what_the_next_compile_removes_and_the_living_keep_theirs(
    tiny_model: MakeTiny, path: Path
) -> None:
    before = digest(path)
    killed = start(tiny_model("llama16"), path, 1.0)
    killed.kill()
    killed.communicate()
    left = temporaries(path.parent)
    assert len(left) == 1
    assert digest(path) == before
    living = start(tiny_model("llama16"), path, 1.0)
    assert left.isdisjoint(temporaries(path.parent))
    held = temporaries(path.parent)
    assert main(["compile", str(tiny_model("llama16")), "-o", str(path), "--rotate", "none"]) == 0
    assert temporaries(path.parent) == held
    living.kill()
    living.communicate()
    assert digest(path) == before  # the same model, the same options
    EngineFile.open(path, check=True).close()


def test_two_compiles_to_one_path_both_end_well(tiny_model: MakeTiny, path: Path) -> None:
    first = start(tiny_model("llama16"), path, 0.02)
    assert main(["compile", str(tiny_model("llama16")), "-o", str(path), "--rotate", "none"]) == 0
    _, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    with EngineFile.open(path, check=True) as engine:
        assert engine.manifest["scheme"] in ("fp32", "w4a8")
    assert os.listdir(path.parent) == ["e.plan"]
