"""Which backend an engine gets, and what it says where that is not its plan's."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_gpu
import pytest
from fake_gpu import FakeDevice, fake_trt
from scatter_engine import VERSION, Scatter, plan_record, write_scatter

from rqc.runtime.backends import choice, plan_choice
from rqc.runtime.backends.cuda import Cuda, open_cuda
from rqc.runtime.backends.plan_choice import Chosen, Plan, choose, import_module
from rqc.runtime.backends.tensorrt import _TYPES, TensorrtBackend
from rqc.runtime.build import build_plan
from rqc.runtime.container import EngineFile
from rqc.runtime.engine import Engine
from rqc.runtime.errors import EngineFormatError, InputError, ResourceError, TargetError
from rqc.runtime.manifest import FORMAT, check_manifest

NO_DEVICE = "no CUDA device"


def absent(name: str) -> Any:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def chosen(sm: int = 86, version: str = VERSION, *records: dict[str, Any]) -> Chosen | list[str]:
    device = FakeDevice(sm)
    listed = [Plan.of(record) for record in records or (plan_record(Scatter()),)]
    return choose(listed, importer=lambda _name: fake_trt(device, version=version), find_device=lambda: device)


@pytest.fixture
def nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU."""
    monkeypatch.setattr(choice, "choose", lambda listed: choose(listed, find_device=lambda: NO_DEVICE))


def test_a_plan_of_this_version_and_gpu_is_taken() -> None:
    found = chosen()
    assert isinstance(found, Chosen)
    assert (found.plan.name, found.plan.label) == ("tiny", "TensorRT-RTX plan (SM 80, 86)")


@pytest.mark.parametrize(
    ("sm", "version", "told"),
    [
        (89, VERSION, "the GPU (Fake 4090) is SM 89"),
        (90, VERSION, "the GPU (Fake 4090) is SM 90"),
        (86, "1.6.0.1", f"tensorrt_rtx is 1.6.0.1, and a plan runs on the version that built it, {VERSION}"),
    ],
)
def test_other_versions_and_gpus_are_not(sm: int, version: str, told: str) -> None:
    assert chosen(sm, version) == [told]


@pytest.mark.parametrize(("key", "what"), [("batch", "rows"), ("prompt", "tokens of a prompt")])
def test_profiles_without_single_rows_or_tokens_are_not(key: str, what: str) -> None:
    record = plan_record(Scatter())
    record["profile"][key] = [2, 4, 4]
    assert chosen(86, VERSION, record) == [f"the plan tiny takes no less than 2 {what}"]


def test_a_plan_for_the_gpu_that_built_it_is_left_to_tensorrt() -> None:
    record = plan_record(Scatter(target="tensorrt"), sms=[])
    found = chosen(87, VERSION, record)
    assert isinstance(found, Chosen)
    assert found.plan.label == "TensorRT plan"
    check_manifest(manifest(flavour="tensorrt", sms=[]))


def test_the_first_that_runs_is_taken() -> None:
    one, two = (plan_record(Scatter(), name=name, sms=sms) for name, sms in (("old", [75]), ("new", [86])))
    found = chosen(86, VERSION, one, two)
    assert isinstance(found, Chosen)
    assert found.plan.name == "new"


def test_modules_that_are_not_there() -> None:
    listed = [Plan.of(plan_record(Scatter(target=target))) for target in ("tensorrt-rtx", "tensorrt")]
    reasons = choose(listed, importer=absent, find_device=FakeDevice)
    assert reasons == [f"the Python module {name} is not installed" for name in ("tensorrt_rtx", "tensorrt")]


def test_modules_that_do_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_trt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    (tmp_path / "half_trt.py").write_text("import no_such_bindings")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, told in (("broken_trt", "libnvinfer.so.11"), ("half_trt", "no_such_bindings")):
        with pytest.raises(TargetError, match=f"the module {name} does not load .*{told}"):
            import_module(name)
    with pytest.raises(ModuleNotFoundError):
        import_module("no_such_trt")


@pytest.mark.usefixtures("nothing_here")
def test_onnx_runtime_stands_in_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_scatter(tmp_path / "e.plan", Scatter())
    with caplog.at_level(logging.WARNING, "rqc.runtime"):
        engine = Engine.load(path, threads=1)
    assert (engine.backend, engine.context_length) == ("onnxruntime", 256)
    assert engine.fallback_reason == (
        "no CUDA device: this engine's TensorRT-RTX plan (SM 80, 86) does not run here; ONNX Runtime runs its ONNX part"
    )
    assert [record.message for record in caplog.records] == [engine.fallback_reason]
    assert len(engine.generate_ids([1, 2, 3], max_new_tokens=3)) == 3
    with pytest.raises(TargetError, match=NO_DEVICE) as error:
        Engine.load(path, backend="tensorrt")
    assert error.value.hint == "backend onnxruntime runs its ONNX part"
    caplog.clear()
    assert Engine.load(path, threads=1, backend="onnxruntime").fallback_reason is None
    assert not caplog.records


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt"])
def test_a_pending_plan(tmp_path: Path, target: str) -> None:
    path = write_scatter(tmp_path / "e.plan", Scatter(target=target), pending=True)
    name = {"tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}[target]
    told = f"this engine's {name} plan is pending"
    assert Engine.load(path, threads=1).fallback_reason == f"{told}; ONNX Runtime runs its ONNX part"
    with pytest.raises(TargetError, match=told) as error:
        Engine.load(path, backend="tensorrt")
    assert error.value.hint == f"rqc build ENGINE --target {target}"


def test_an_engine_without_a_plan(engine_path: Callable[..., Path]) -> None:
    engine = Engine.load(engine_path(), threads=1)
    assert (engine.backend, engine.fallback_reason) == ("onnxruntime", None)
    with pytest.raises(TargetError, match="this engine has no plan") as error:
        Engine.load(engine_path(), backend="tensorrt")
    assert "--target tensorrt-rtx" in error.value.hint
    with pytest.raises(InputError, match="backend is 'cuda'") as wrong:
        Engine.load(engine_path(), backend="cuda")
    assert wrong.value.hint == "backend is one of auto, onnxruntime, tensorrt"


@pytest.mark.usefixtures("nothing_here")
@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
def test_bf16_has_no_kernels_on_a_cpu(tmp_path: Path, backend: str) -> None:
    path = write_scatter(tmp_path / "e.plan", Scatter(dtype="bf16"), plan=b"vtrt")
    with pytest.raises(TargetError, match="bf16, for which ONNX Runtime has no kernels on a CPU") as error:
        Engine.load(path, backend=backend)
    assert (NO_DEVICE in error.value.message) == (backend == "auto")


@pytest.mark.usefixtures("nothing_here")
@pytest.mark.parametrize("backend", ["auto", "onnxruntime", "tensorrt"])
def test_4_bit_floats_have_no_kernels_on_a_cpu(tmp_path: Path, backend: str) -> None:
    path = write_scatter(tmp_path / "e.plan", Scatter(weights="nvfp4"), plan=b"vtrt")
    with pytest.raises(TargetError) as error:
        Engine.load(path, backend=backend)
    if backend == "tensorrt":
        assert NO_DEVICE in error.value.message
        assert "onnxruntime" not in error.value.hint
    else:
        assert "4-bit floats (nvfp4a16), for which ONNX Runtime has no kernels on a CPU" in error.value.message
        assert (NO_DEVICE in error.value.message) == (backend == "auto")
        assert "SM 120" in error.value.hint
        assert "w4a16" in error.value.hint


def test_running_on_a_cpu_imports_no_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_choice.importlib, "import_module", absent)
    monkeypatch.setattr(choice, "choose", lambda listed: choose(listed, find_device=lambda: NO_DEVICE))
    assert Engine.load(write_scatter(tmp_path / "e.plan", Scatter()), threads=1).backend == "onnxruntime"


# the real module, as far as it goes without a GPU


def test_a_file_that_is_no_plan_is_told_in_tensorrts_words(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    path = write_scatter(tmp_path / "e.plan", Scatter(), plan=b"no plan", version=trt.__version__)
    with EngineFile.open(path) as file:
        found = choose(plan_choice.plans_of(file.manifest), importer=lambda _name: trt, find_device=FakeDevice)
        assert isinstance(found, Chosen)
        with pytest.raises(TargetError, match=r"TensorRT-RTX does not load the plan \(tiny\): .*Error Code"):
            TensorrtBackend(file, found)


def test_the_real_module_has_what_the_backend_calls() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    engine, context, config = fake_gpu._Engine, fake_gpu._Context, ("cuda_graph_strategy",)
    for real, names in (
        (trt.ICudaEngine, vars(engine)),
        (trt.IExecutionContext, vars(context)),
        (trt.IRuntimeConfig, config),
    ):
        called = {name for name in names if not name.startswith("_") and name not in ("batch", "prompt")}
        assert called <= set(dir(real))
    fake = fake_trt(FakeDevice())
    for name in (
        "TensorIOMode",
        "TensorLocation",
        "DataType",
        "ExecutionContextAllocationStrategy",
        "CudaGraphStrategy",
    ):
        assert set(getattr(fake, name).__members__) <= set(dir(getattr(trt, name)))
    assert set(_TYPES) <= set(dir(trt.DataType))


# the manifest

ENTRY = {"offset": 0, "size": 1, "sha256": "0" * 64}


def manifest(**changes: Any) -> dict[str, Any]:
    record = {key: value for key, value in plan_record(Scatter(), **changes).items() if value is not ...}
    return {"format": FORMAT, "format_version": 1, "entries": {"device/tiny.plan": ENTRY}, "plans": [record]}


def profile(**changes: Any) -> dict[str, Any]:
    return {"batch": [1, 1, 1], "prompt": [1, 8, 16], "context": 64, **changes}


def test_manifests_with_plans() -> None:
    check_manifest(manifest())
    check_manifest(manifest(verified=True, reason=None))
    check_manifest(manifest(verified=..., reason=...))
    check_manifest({**manifest(), "plans": []})
    assert plan_choice.plans_of({"target": "onnx"}) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": ...}, "name is 'None'"),
        ({"name": ""}, "no name"),
        ({"version": 1.7}, "version is"),
        ({"version": ""}, "no version"),
        ({"flavour": "cuda"}, "flavour is 'cuda' instead of one of tensorrt-rtx, tensorrt"),
        ({"entry": "device/other.plan"}, "the plan 'tiny' is in 'device/other.plan'"),
        ({"entry": "device/other.plan", "name": "other"}, "'device/other.plan', which is no entry"),
        ({"entry": "device/../tiny.plan", "name": "../tiny"}, "the plan '../tiny' is in"),
        ({"entry": ["device/tiny.plan"]}, "entry is"),
        ({"sms": []}, "sms is"),
        ({"sms": 86}, "sms is"),
        ({"sms": ["86"]}, "sms is"),
        ({"sms": [86, -1]}, "sms is"),
        ({"verified": 1}, "verified is"),
        ({"reason": 1}, "reason is"),
        ({"profile": ...}, "profile is"),
        ({"profile": [1, 2]}, "profile is"),
        ({"profile": {}}, "batch of a profile"),
        ({"profile": profile(batch=1)}, "batch of a profile"),
        ({"profile": profile(batch=[1, 2])}, "not min, opt and max"),
        ({"profile": profile(batch=[0, 1, 2])}, "not min, opt and max"),
        ({"profile": profile(prompt=[1, 16, 8])}, "not min, opt and max"),
        ({"profile": profile(prompt=[1, 8.0, 16])}, "not min, opt and max"),
        ({"profile": profile(context=0)}, "context of a profile"),
        ({"profile": profile(context=True)}, "context of a profile"),
    ],
)
def test_plans_that_are_none(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(EngineFormatError, match=told):
        check_manifest(manifest(**changes))


@pytest.mark.parametrize(
    ("listed", "told"), [({}, "plans is"), ([7], "plans has '7'"), ([plan_record(Scatter())] * 2, "a name twice")]
)
def test_lists_of_plans_that_are_none(listed: Any, told: str) -> None:
    with pytest.raises(EngineFormatError, match=told):
        check_manifest({**manifest(), "plans": listed})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"profile": [1]}, "profile is"),
        ({"profile": {}}, "profile: batch of a profile"),
        ({"profile": profile(context=-1)}, "profile: context of a profile"),
        ({"sms": 86}, "sms is"),
        ({"sms": ["86"]}, "sms is"),
    ],
)
def test_shapes_and_capabilities_to_build_for_that_are_none(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(EngineFormatError, match=told):
        check_manifest({**manifest(), **changes})


def test_an_engine_that_says_of_no_shapes_is_not_built(tmp_path: Path) -> None:
    with EngineFile.open(write_scatter(tmp_path / "e.plan", Scatter(), pending=True)) as engine:
        assert "profile" not in engine.manifest
        with pytest.raises(EngineFormatError, match="has no profile"):
            build_plan(engine, "tensorrt-rtx")


# libcudart


class FakeCudart:
    """libcudart as ctypes sees it; `statuses` names calls that fail."""

    def __init__(self, count: int = 1, **statuses: int) -> None:
        self.count, self.statuses, self.calls = count, statuses, []
        self.cudaGetErrorString = lambda status: f"words of {status.value}".encode()

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self.statuses:
                return self.statuses[name]
            self._answer(name, arguments)
            return 0

        return call

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "cudaGetDeviceCount":
            arguments[0]._obj.value = self.count
        elif name == "cudaDeviceGetAttribute":
            arguments[0]._obj.value = {75: 12, 76: 1}[arguments[1].value]
        elif name in ("cudaMalloc", "cudaStreamCreateWithFlags", "cudaGraphInstantiateWithFlags"):
            arguments[0]._obj.value = 4096
        elif name == "cudaGetDeviceProperties":
            ctypes.memmove(arguments[0], b"NVIDIA Thor\0", 12)


def test_a_machine_without_cuda_is_told() -> None:
    assert open_cuda(FakeCudart(count=0)) == "no CUDA device"
    assert open_cuda(FakeCudart(cudaGetDeviceCount=100)) == "no CUDA device"
    assert str(open_cuda(FakeCudart(cudaGetDeviceCount=35))).startswith("no CUDA driver")
    assert open_cuda(FakeCudart(cudaGetDeviceCount=3)) == "no CUDA device (words of 3, status 3)"
    broken = open_cuda(FakeCudart(cudaStreamCreateWithFlags=46))
    assert isinstance(broken, str)
    assert broken.startswith("no usable CUDA device (the GPU failed (cudaStreamCreateWithFlags: words of 46")


def test_no_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqc.runtime.backends.cuda._candidates", lambda: iter(["/no/such/libcudart.so"]))
    assert open_cuda() == "no CUDA runtime library (libcudart)"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX names")
def test_libraries_of_nvidias_packages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rqc.runtime.backends.cuda import _candidates

    library = tmp_path / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert list(_candidates())[-1] == str(library)


def test_calls_and_their_failures() -> None:
    library = FakeCudart()
    cuda = open_cuda(library)
    assert isinstance(cuda, Cuda)
    assert (cuda.sm, cuda.name, cuda.stream, cuda.malloc(10)) == (121, "NVIDIA Thor", 4096, 4096)
    cuda.begin_capture()
    cuda.launch(cuda.end_capture())
    assert library.calls[-4:] == [
        *("cudaStreamEndCapture", "cudaGraphInstantiateWithFlags", "cudaGraphDestroy", "cudaGraphLaunch")
    ]
    library.statuses |= {"cudaMalloc": 2, "cudaStreamSynchronize": 700}
    with pytest.raises(ResourceError, match=r"for 10 bytes \(cudaMalloc: words of 2, status 2\)"):
        cuda.malloc(10)
    with pytest.raises(TargetError, match=r"the GPU failed \(cudaStreamSynchronize: words of 700"):
        cuda.synchronize()
    assert library.calls[-1] == "cudaGetLastError"
