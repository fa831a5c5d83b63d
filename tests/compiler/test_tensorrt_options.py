"""What is asked of a compile for TensorRT holds: its capabilities in a later build, its memory before it starts."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import TinyModel, add_tokenizer

from rqc.compiler.api import compile_engine
from rqc.compiler.cli import main
from rqc.models.checkpoint import Checkpoint
from rqc.runtime import build
from rqc.runtime.add_plan import add_plan
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import ResourceError, TargetError

QUICK: dict[str, Any] = {"target": "tensorrt-rtx", "scheme": "w4a16", "profile": "1/1:16:32/64", "rotate": "none"}
GIB = 1 << 30


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the builder is asked for; it gives an empty plan."""
    asked: list[dict[str, Any]] = []

    def built(engine: object, job: dict[str, Any], *_: object) -> tuple[memoryview, str]:
        asked.append(job)
        return memoryview(b"vtrt"), "1.7.1"

    monkeypatch.setattr(build, "_build", built)
    monkeypatch.setattr(build, "require_builder", lambda flavour, compiled: flavour)
    return asked


def test_a_later_build_is_for_the_capabilities_of_the_compile(
    tiny_model: TinyModel, tmp_path: Path, jobs: list[dict[str, Any]]
) -> None:
    compile_engine(tiny_model("llama16"), tmp_path / "e.plan", **QUICK, sm="8.6,120", portable=True)
    add_plan(tmp_path / "e.plan", target="tensorrt-rtx")
    add_plan(tmp_path / "e.plan", target="tensorrt-rtx", sm="89")
    add_plan(tmp_path / "e.plan", target="tensorrt")
    assert [job["sms"] for job in jobs] == [[86, 120], [89], []]
    with EngineFile.open(tmp_path / "e.plan") as engine:
        assert engine.manifest["sms"] == [86, 120]
        assert [plan["name"] for plan in engine.manifest["plans"]][1:] == ["tensorrt-rtx-86-120", "tensorrt-rtx-89"]


def test_the_builder_counts_in_the_estimate(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 0.25 GiB and 4.9 times the weights in a process of its own, and the plan holds the weights again."""
    monkeypatch.setattr("rqc.compiler.sizes.highest_bytes", lambda: 0)  # that of other tests of this process
    directory = tiny_model("llama16", hidden_size=192, intermediate_size=2048)
    both, part = (
        compile_engine(directory, None, dry_run=True, **QUICK, portable=way).estimate for way in (False, True)
    )
    assert both is not None
    assert part is not None
    assert both.size_bytes >= 2 * part.size_bytes - 1_000_000
    assert part.builder_bytes == 0
    assert both.peak_rss_bytes >= both.builder_bytes > GIB / 4 + 4 * part.size_bytes
    assert both.peak_rss_bytes > part.peak_rss_bytes
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr("rqc.compiler.pipeline.require_builder", lambda flavour: flavour)
    with pytest.raises(ResourceError, match="to build the plan") as error:
        compile_engine(directory, tmp_path / "e.plan", **QUICK, max_memory=both.builder_bytes)
    assert "--portable" in error.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_the_estimate_is_close_to_what_is_built(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16", hidden_size=192, intermediate_size=2048)
    estimated = compile_engine(directory, None, dry_run=True, **QUICK, sm=86).estimate
    report = compile_engine(directory, tmp_path / "e.plan", **QUICK, sm=86)
    assert estimated is not None
    assert abs(estimated.size_bytes - report.size_bytes) < 600_000  # the graph, gaps of alignment, the plan's program


def test_measuring_ranges_keeps_to_the_memory(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = add_tokenizer(shutil.copytree(tiny_model("llama16"), tmp_path / "model"))
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(ResourceError, match="measuring the ranges of activations") as error:
        compile_engine(directory, tmp_path / "e.plan", **{**QUICK, "scheme": "w8a8"}, portable=True, max_memory="64MiB")
    assert "--calibration-length" in error.value.hint


def test_a_builder_that_is_missing_where_the_engine_is_there(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_engine(tiny_model("llama16"), tmp_path / "e.plan", **QUICK, portable=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    for target, way in (("tensorrt", "on that device, with tensorrt installed"), ("tensorrt-rtx", "pip install")):
        with pytest.raises(TargetError) as error:
            add_plan(tmp_path / "e.plan", target=target)
        assert way in error.value.hint
        assert "--portable" not in error.value.hint


@pytest.mark.parametrize(
    ("line", "way"),
    [
        ("raise OSError(28, 'No space left on device')", "TMPDIR"),
        ("raise ImportError('libnvinfer.so.11: cannot open shared object file')", "install the module again"),
        ("import tensorrt_bindings_that_are_not_there", "install the module again"),
        ("raise MemoryError", "more memory"),
    ],
)
def test_the_way_out_fits_what_broke_the_builder(
    line: str, way: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_engine(tiny_model("llama16"), tmp_path / "e.plan", **QUICK, portable=True)
    (tmp_path / "worker.py").write_text(line)
    monkeypatch.setattr(build.build_worker, "__file__", str(tmp_path / "worker.py"))
    monkeypatch.setattr(build, "require_builder", lambda flavour, compiled: flavour)
    with pytest.raises(ResourceError, match="the TensorRT builder broke down") as error:
        add_plan(tmp_path / "e.plan", target="tensorrt-rtx")
    assert way in error.value.hint


def test_a_flag_takes_back_what_a_recipe_says_of_portable(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('target = "tensorrt"\nportable = true\nrotate = "none"\n')
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "tensorrt" else object())
    arguments = ["compile", str(tiny_model("llama16")), "-o", str(tmp_path / "e.plan"), "--recipe", str(recipe)]
    assert main([*arguments, "--no-portable"]) == 2
    assert "--portable writes the ONNX part" in capsys.readouterr().err
    assert main(arguments) == 0
