"""Engines with TensorRT plans on the command line where no GPU is: what is said, shown and extracted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scatter_engine import VERSION, Scatter, plan_graph, write_scatter

from rqc.runtime import doctor
from rqc.runtime.backends import choice, gpu_report, plan_choice
from rqc.runtime.errors import InputError
from rqc.runtime.extract import extract

RUN = """
import sys
from rqc.runtime.backends import choice, plan_choice
from rqc.compiler.cli import main
choose = plan_choice.choose
choice.choose = lambda plans: choose(plans, find_device=lambda: "no CUDA device")
sys.exit(main())
"""
REASON = (
    "no CUDA device: this engine's TensorRT-RTX plan (SM 80, 86) does not run here; ONNX Runtime runs its ONNX part"
)


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = plan_choice.choose
    monkeypatch.setattr(choice, "choose", lambda plans: choose(plans, find_device=lambda: "no CUDA device"))


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scatter(tmp_path_factory.mktemp("planned") / "e.plan", Scatter(adapters=2))


@pytest.fixture(scope="module")
def pending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scatter(tmp_path_factory.mktemp("pending") / "e.plan", Scatter(), pending=True)


def test_bench_says_once_on_stderr_what_runs(planned: Path) -> None:
    arguments = ["bench", planned, "--prompt-tokens", 4, "--new-tokens", 3, "--repeats", 1, "--threads", 1, "--json"]
    done = subprocess.run([sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [REASON]
    assert json.loads(done.stdout)["new_tokens"] == 3
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments), "--backend", "onnxruntime"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_cannot_run_is_an_error_where_it_is_asked_for(rqc: Any, planned: Path, pending: Path) -> None:
    done = rqc("bench", planned, "--backend", "tensorrt")
    assert done.code == 2
    assert done.err.splitlines() == [
        f"error: {REASON.split(';')[0]}",
        "hint: backend onnxruntime runs its ONNX part",
    ]
    done = rqc("run", pending, "-p", "x", "--backend", "tensorrt")
    assert done.err.splitlines()[-1] == "hint: rqc build ENGINE --target tensorrt-rtx"


def test_inspect_shows_plans(rqc: Any, planned: Path, pending: Path, engine: Path) -> None:
    told = [line for line in rqc("inspect", planned).out.splitlines() if line.startswith("plan ")]
    size = len(plan_graph(Scatter(adapters=2)))
    assert told == [
        f"plan            tiny, tensorrt-rtx {VERSION}, SM 80, 86, batch 1:1:4, prompt 1:16:16, context 64, "
        f"{size / 1e3:.1f} kB, not verified: built without a GPU"
    ]
    [plan] = rqc("inspect", planned, "--json").value["plans"]
    assert (plan["size_bytes"], plan["sms"], plan["verified"]) == (size, [80, 86], False)
    assert "plan            pending: rqc build adds it" in rqc("inspect", pending).out
    assert rqc("inspect", pending, "--json").value["plans"] == []
    assert "\nplan" not in rqc("inspect", engine).out
    notes = rqc("inspect", planned, "--json").value["execution"]
    assert notes[0].startswith("computed in fp16, activations: ")
    assert "float products" in notes[1]


def test_raw_plans_are_extracted(rqc: Any, planned: Path, tmp_path: Path) -> None:
    done = rqc("extract", planned, "-o", tmp_path / "raw", "--format", "trt", "--json")
    assert [Path(name).name for name in done.value["files"]] == ["tiny.plan", "tiny.json"]
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["tiny.json", "tiny.plan"]
    assert (tmp_path / "raw" / "tiny.plan").read_bytes() == plan_graph(Scatter(adapters=2))
    about = json.loads((tmp_path / "raw" / "tiny.json").read_text())
    assert (about["version"], about["sms"], about["profile"]["context"]) == (VERSION, [80, 86], 64)


def test_the_tensors_of_an_extracted_plan_are_the_graphs(planned: Path, tmp_path: Path) -> None:
    import onnxruntime as ort

    extract(planned, tmp_path / "raw", "trt")
    tensors = {tensor["name"]: tensor for tensor in json.loads((tmp_path / "raw" / "tiny.json").read_text())["tensors"]}
    session = ort.InferenceSession(str(tmp_path / "raw" / "tiny.plan"))
    for mode, args in (("input", session.get_inputs()), ("output", session.get_outputs())):
        assert {name for name, tensor in tensors.items() if tensor["mode"] == mode} == {arg.name for arg in args}
        for arg in args:
            shape = [size if isinstance(size, int) else -1 for size in arg.shape]
            kind = arg.type.removeprefix("tensor(").removesuffix(")").replace("float", "float32")
            found = tensors[arg.name]
            assert (found["shape"], found["type"]) == (shape, kind.replace("float3216", "float16"))
    assert tensors["present.1.value"]["shares"] == "past_key_values.1.value"


def test_without_a_plan_there_is_none_to_extract(rqc: Any, pending: Path, engine: Path, tmp_path: Path) -> None:
    done = rqc("extract", pending, "-o", tmp_path / "raw", "--format", "trt")
    assert done.code == 2
    assert "has no TensorRT plan yet" in done.err
    assert done.err.splitlines()[-1] == f"hint: rqc build {pending} --target tensorrt-rtx"
    done = rqc("extract", engine, "-o", tmp_path / "raw", "--format", "trt")
    assert "has no TensorRT plan\n" in done.err
    with pytest.raises(InputError, match="format is 'onnx'"):
        extract(engine, tmp_path / "raw", "onnx")
    assert not list(tmp_path.iterdir())
    rqc("extract", pending, "-o", tmp_path / "all")
    assert (tmp_path / "all" / "graph.onnx").exists()


def test_doctor_tells_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from fake_gpu import FakeDevice, fake_trt

    device = FakeDevice(86)

    def importer(name: str) -> Any:
        if name == "tensorrt":
            raise ModuleNotFoundError(name=name)
        return fake_trt(device)

    without = gpu_report.report_gpu(importer=importer, find_device=lambda: "no CUDA device")
    assert dict(gpu_report.to_rows(without)) == {
        "gpu": "none: no CUDA device",
        "tensorrt-rtx": f"{VERSION}; builds ahead of time; runs: no CUDA device",
        "tensorrt": "not installed",
    }
    found = gpu_report.report_gpu(importer=importer, find_device=lambda: device)
    assert dict(gpu_report.to_rows(found)) == {
        "gpu": "Fake 4090, SM 86",
        "tensorrt-rtx": f"{VERSION}; builds ahead of time; runs: plans of version {VERSION} for SM 86",
        "tensorrt": "not installed",
    }
    monkeypatch.setattr(gpu_report, "report_gpu", lambda: found)
    report = doctor.diagnose()
    assert report["gpu"] == {"name": "Fake 4090", "sm": 86, "reason": None}
    assert "tensorrt-rtx  1.7.1.116; builds" in doctor.to_text(report)
    json.dumps(report)
