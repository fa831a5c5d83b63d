"""A device: a virtual environment that holds rqc and what its base install declares, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
RQC = "import sys; from rqc.compiler.cli import main; sys.exit(main())"


def declared(name: str) -> dict[str, Distribution]:
    """The distributions that `pip install name` brings on this machine, by name, as far as they are installed here."""
    found: dict[str, Distribution] = {}
    wanted: list[tuple[str, frozenset[str]]] = [(name, frozenset())]
    seen = set(wanted)
    while wanted:
        current, extras = wanted.pop()
        found[current] = distribution(current)
        for line in found[current].requires or []:
            need = Requirement(line)
            if need.marker is not None and not any(need.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                continue
            key = (need.name, frozenset(need.extras))
            if key not in seen:
                seen.add(key)
                wanted.append(key)
    return found


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of such an environment: links to the packages installed here, none that is not declared."""
    folder = tmp_path_factory.mktemp("device")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "rqc").symlink_to(ROOT)
    for name, dist in declared("rqc").items():
        parts = {file.parts[0] for file in dist.files or []} - {"..", "__pycache__"}
        if name == "rqc":
            parts = {part for part in parts if part.endswith(".dist-info")}
        for part in parts:
            if not (packages / part).exists():
                (packages / part).symlink_to(Path(str(dist.locate_file(part))))
    return folder / "bin" / "python"


def on(device: Path, *args: object, code: str = RQC) -> subprocess.CompletedProcess[str]:
    """Run rqc, or code, on the device; no path of ours reaches it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL"))}
    command = [str(device), "-c", code, *map(str, args)]
    return subprocess.run(
        command, env={**environment, "OMP_NUM_THREADS": "1"}, cwd="/", capture_output=True, text=True, check=False
    )


def test_nothing_else_is_there(device: Path) -> None:
    for name in ("torch", "transformers", "peft", "mobius", "onnx", "onnx_ir", "safetensors", "onnxscript"):
        assert on(device, code=f"import {name}").returncode == 1


def test_the_commands_of_a_device(device: Path, engine: Path, tmp_path: Path) -> None:
    made = on(device, "run", engine, "-p", "the cat", "--max-new-tokens", "4", "--threads", "1")
    assert (made.returncode, made.stderr) == (0, "")
    assert on(device, "inspect", engine, "--check").returncode == 0
    measured = on(device, "bench", engine, "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1", "--json")
    assert json.loads(measured.stdout)["prompt_tokens"] == 4
    assert on(device, "extract", engine, "-o", tmp_path / "parts").returncode == 0
    doctor = json.loads(on(device, "doctor", "--json").stdout)
    assert doctor["run"] == {"onnx": True}
    assert doctor["compile"] == {"onnx": False}
    assert "torch" in doctor["missing"]
    for command in (["compile", "m", "-o", "e.plan"], ["verify", engine, "m"]):
        refused = on(device, *command)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].startswith("hint: ")


def test_python_on_a_device(device: Path, engine: Path) -> None:
    code = """
import sys, rqc
with rqc.load(sys.argv[1], threads=1) as engine:
    assert isinstance(engine.generate("the cat", max_new_tokens=2), str)
    assert isinstance(engine.chat([{"role": "user", "content": "Hi"}], max_new_tokens=2), str)
    assert engine.logits([1, 2]).shape == (2, engine.vocab_size)
for name in ("compile", "verify"):
    try:
        getattr(rqc, name)("a", "b")
    except rqc.RqcError as error:
        assert "rqc[compile]" in error.hint or "Python" in error.message
    else:
        sys.exit(name)
"""
    done = on(device, engine, code=code)
    assert done.returncode == 0, done.stderr
