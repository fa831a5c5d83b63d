"""TensorRT-RTX plans of whole models, built on a machine without a GPU; what fails leaves the old engine."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import TinyModel, give_voice
from tiny_adapters import W4, basis_of, random_deltas, save_peft

from rqc.compiler.api import compile_engine
from rqc.compiler.cli import main
from rqc.models.adapter import write_adapter
from rqc.runtime import build
from rqc.runtime.add_plan import add_plan
from rqc.runtime.build import build_plan
from rqc.runtime.container import EngineFile
from rqc.runtime.engine import Engine
from rqc.runtime.errors import InputError, ResourceError, SchemeError, TargetError
from rqc.runtime.extract import extract
from rqc.runtime.plans import BuiltPlan, with_plans

pytest.importorskip("tensorrt_rtx", reason="the module tensorrt_rtx is not installed")
PROFILE = "1/1:16:32/64"
QUICK: dict[str, Any] = {"target": "tensorrt-rtx", "sm": "86", "profile": PROFILE, "rotate": "none"}
PLAN = "device/tensorrt-rtx-86.plan"
TELLING = """
import sys
from rqc.compiler import cli
from rqc.runtime import build

def tell(place, progress):
    print(place, file=sys.stderr, flush=True)
    return run(place, progress)

run, build._run_worker = build._run_worker, tell
sys.exit(cli.main(sys.argv[1:]))
"""
"""A compile that says where its builder works."""


def plan_of(path: Path, name: str = PLAN) -> bytes:
    """A plan, read out of its engine and checked for what every plan is."""
    with EngineFile.open(path, check=True) as engine:
        assert name in engine.names()
        plan = bytes(engine.read(name))
        [record] = [one for one in engine.manifest["plans"] if one["entry"] == name]
    assert plan[:4] == b"vtrt"
    assert struct.unpack_from("<Q", plan, 16) == (len(plan),)
    assert record["flavour"] == "tensorrt-rtx"
    assert record["verified"] is False
    assert record["version"].count(".") >= 2
    return plan


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"scheme": "w4a16", "rotate": "r1,r2,r3,r4"}),
    ("mistral", {"scheme": "w4a8", "rotate": "r1"}),
    ("qwen2", {"scheme": "w4a4", "rotate": "r1,r2,r4"}),
    ("qwen3-16", {"scheme": "w6a6", "rotate": "r3"}),
    ("phi3", {"scheme": "w8a8", "rotate": "r4"}),
    ("gemma2", {"scheme": "w8a16"}),
    ("gemma3", {"scheme": "w3a16", "rotate": "r2"}),
    ("mixtral", {"scheme": "w4a16", "symmetric": False, "group_size": 64}),
    ("llama-tied", {"scheme": "w2a16", "dtype": "bf16"}),
    ("smollm3", {"scheme": "fp16"}),
    ("llama-bias", {"scheme": "fp32"}),
    ("phi3", {"scheme": "fp8a16", "sm": "89", "rotate": "r1,r2,r3,r4"}),
    ("mixtral", {"scheme": "fp8a16", "sm": "89,120", "dtype": "bf16"}),
    ("llama-tied", {"scheme": "nvfp4a16", "sm": "120", "rotate": "r1,r2,r3,r4"}),
    ("gemma3", {"scheme": "nvfp4a16", "sm": "120,121", "embedding_bits": 4}),
    ("qwen2", {"scheme": "nvfp4a16", "sm": "120", "dtype": "fp32"}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name} {o['scheme']}" for name, o in CASES])
def test_schemes_rotations_and_families_build(
    name: str, options: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model(name)
    if options["scheme"] == "w8a8":
        directory = give_voice(directory)
        options = {**options, "calibration_samples": 2, "calibration_length": 32}
    report = compile_engine(directory, tmp_path / "e.plan", **{**QUICK, **options})
    plan_of(tmp_path / "e.plan", f"device/tensorrt-rtx-{options.get('sm', '86').replace(',', '-')}.plan")
    assert report.size_bytes == (tmp_path / "e.plan").stat().st_size
    assert os.listdir(tmp_path) == ["e.plan"]


@pytest.mark.parametrize("how", ["fold", "branch", "zero-point", "switched"])
def test_every_way_of_an_adapter_builds(how: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    options: dict[str, Any] = {**QUICK, "scheme": "w4a8", "min_survival": -9.0}
    if how == "zero-point":
        basis = basis_of(directory, "r1,r4", **W4, adapter_type="qalora")
        write_adapter(tmp_path / "pooled", random_deltas(directory, pool=16), basis)
        options = {**QUICK, "scheme": "w4a16", "adapter": tmp_path / "pooled"}
        del options["rotate"]
    elif how == "switched":
        options["adapter"] = {
            "poet": save_peft(directory, tmp_path / "a"),
            "clerk": save_peft(directory, tmp_path / "b"),
        }
    else:
        options |= {"merge": how, "adapter": save_peft(directory, tmp_path / "a")}
    compile_engine(directory, tmp_path / "e.plan", **options)
    assert plan_of(tmp_path / "e.plan")


@pytest.fixture
def rqc(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command in this process."""

    def call(*args: object) -> Any:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture(scope="module")
def made(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with a plan."""
    path = tmp_path_factory.mktemp("made") / "e.plan"
    compile_engine(tiny_model("llama16"), path, **QUICK, scheme="w4a16")
    return path


@pytest.fixture(scope="module")
def pending_once(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pending") / "e.plan"
    compile_engine(tiny_model("llama16"), path, **QUICK, scheme="w4a16", portable=True)
    return path


@pytest.fixture
def pending(pending_once: Path, tmp_path: Path) -> Path:
    """An engine whose plan is still to be built."""
    path = tmp_path / "e.plan"
    path.write_bytes(pending_once.read_bytes())
    return path


def test_equal_inputs_give_equal_plans(made: Path, pending: Path, tmp_path: Path) -> None:
    """Byte for byte, also from an engine of another name in another place, compiled at once or built later."""
    other = tmp_path / "of a much longer name" / "engine-of-llama.plan"
    other.parent.mkdir()
    other.write_bytes(pending.read_bytes())
    add_plan(other, target="tensorrt-rtx", sm="86")
    assert plan_of(other) == plan_of(made)


@pytest.mark.parametrize(("scheme", "sms"), [("fp8a16", "89-120"), ("nvfp4a16", "120")])
def test_small_floats_are_built_for_what_has_them(
    scheme: str, sms: str, rqc: Callable[..., Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """The usual capabilities are narrowed, and that is told; those that are named are not. The plan built later is the
    same."""
    path, entry = tmp_path / "e.plan", f"device/tensorrt-rtx-{sms}.plan"
    options = ["--scheme", scheme, "--rotate", "none", "--profile", PROFILE, "--target", "tensorrt-rtx"]
    done = rqc("compile", tiny_model("llama16"), "-o", path, *options)
    assert done.code == 0, done.err
    assert f"sm {sms.replace('-', ',')}: TensorRT-RTX has {'8' if scheme == 'fp8a16' else '4'}-bit float" in done.err
    first = plan_of(path, entry)
    done = rqc("compile", tiny_model("llama16"), "-o", path, *options, "--portable")
    assert done.code == 0, done.err
    add_plan(path, target="tensorrt-rtx")
    assert plan_of(path, entry) == first
    before = digest(path)
    for command in (("build", path, *options[-2:]), ("compile", tiny_model("llama16"), "-o", path, *options)):
        refused = rqc(*command, "--sm", "80,86,120")
        assert refused.code == 2
        assert "float weights on SM 80, SM 86" in refused.err.splitlines()[-2]
    assert digest(path) == before


def test_an_engine_of_4_bit_floats_says_that_it_runs_by_its_plan_alone(
    rqc: Callable[..., Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tmp_path / "e.plan"
    options = ["--scheme", "nvfp4a16", "--rotate", "none", "--target", "tensorrt-rtx", "--portable"]
    assert rqc("compile", give_voice(tiny_model("llama-tied")), "-o", path, *options).code == 0
    done = rqc("run", path, "-p", "x")
    assert done.code == 2
    assert "weights are 4-bit floats (nvfp4a16)" in done.err.splitlines()[-2]
    assert "w4a16" in done.err.splitlines()[-1]
    told = rqc("inspect", path).out
    assert "it runs by its plan alone" in told
    assert "where no plan runs" not in told
    assert "nvfp4a16, groups of 16" in told


def test_all_capabilities_go_into_one_plan(pending: Path) -> None:
    report = add_plan(pending, target="tensorrt-rtx", sm="80,86,89,120", profile="1:1:2/1:16:32/48")
    assert report.plan["sms"] == [80, 86, 89, 120]
    assert report.plan["name"] == "tensorrt-rtx-80-86-89-120"
    assert report.plan["profile"] == {"batch": [1, 1, 2], "prompt": [1, 16, 32], "context": 48}
    plan = plan_of(pending, "device/tensorrt-rtx-80-86-89-120.plan")
    assert report.plan_bytes == len(plan)
    assert report.sha256 == digest(pending)
    # not a contract of TensorRT's, but what it is today: the plan says what it is for
    assert all(f"sm{sm}".encode() in plan for sm in (80, 86, 89, 120))


def test_plans_are_added_and_replaced(rqc: Callable[..., Any], pending: Path, tmp_path: Path) -> None:
    before = digest(pending)
    done = rqc("build", pending, "--target", "tensorrt-rtx", "--sm", "86", "-o", tmp_path / "new.plan", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["plan"]["entry"] == PLAN
    assert digest(pending) == before
    path = tmp_path / "new.plan"
    first = plan_of(path)
    done = rqc("build", path, "--target", "tensorrt-rtx", "--sm", "86", "--profile", "1/1:4:8/16")
    assert f"plan          tensorrt-rtx-86, {len(plan_of(path)) / 1e6:.1f} MB" in done.out
    assert plan_of(path) != first
    with EngineFile.open(path) as engine:
        record = dict(engine.manifest["plans"][0], name="tensorrt", entry="device/tensorrt.plan", flavour="tensorrt")
        with_plans(engine, path, [BuiltPlan(record, memoryview(first))])
    with EngineFile.open(path, check=True) as engine:
        assert [plan["name"] for plan in engine.manifest["plans"]] == ["tensorrt", "tensorrt-rtx-86"]
        assert {PLAN, "device/tensorrt.plan"} <= set(engine.names())
        assert bytes(engine.read("device/tensorrt.plan")) == first
    extract(path, tmp_path / "raw", "trt")
    assert (tmp_path / "raw" / "tensorrt.plan").read_bytes() == first


def test_with_or_without_its_plan_an_engine_is_one_model(made: Path, pending: Path) -> None:
    """ONNX Runtime runs the ONNX part where no GPU is."""
    ids = np.random.default_rng(0).integers(3, 96, 20).tolist()
    with Engine.load(made, backend="onnxruntime") as one, Engine.load(pending, backend="onnxruntime") as other:
        np.testing.assert_array_equal(one.logits(ids), other.logits(ids))


def test_what_the_builder_says_is_told_in_one_line(
    rqc: Callable[..., Any], pending: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest(pending)
    monkeypatch.setattr(build, "_fixed", lambda engine, profile: b"no graph")
    done = rqc("build", pending, "--target", "tensorrt-rtx", "--sm", "86")
    assert done.code == 2
    assert done.err.splitlines()[-2].startswith("error: tensorrt-rtx does not build this engine: its parser refuses")
    assert done.err.splitlines()[-1] == "hint: --target onnx runs it on ONNX Runtime"
    monkeypatch.setattr(
        build, "_run_worker", lambda place, progress: {"error": "Error Code 1:\n  Myelin\n\n(no kernel)"}
    )
    done = rqc("compile", tiny_model("llama16"), "-o", pending, *("--target", "tensorrt-rtx", "--rotate", "none"))
    assert done.code == 2
    assert "does not build this engine: Error Code 1: Myelin (no kernel)" in done.err.splitlines()[-2]
    assert digest(pending) == before
    assert os.listdir(pending.parent) == ["e.plan"]


def test_a_builder_that_breaks_down_leaves_the_old_engine(pending: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed for its memory, say: it has no word to say."""
    before = digest(pending)
    killer = pending.parent / "killer.py"
    killer.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(build.build_worker, "__file__", str(killer))
    with pytest.raises(ResourceError, match=r"the TensorRT builder broke down: it ended with -9"):
        add_plan(pending, target="tensorrt-rtx", sm="86")
    killer.write_text("raise MemoryError('2 GB')")
    with pytest.raises(ResourceError, match=r"the TensorRT builder broke down: MemoryError: 2 GB"):
        add_plan(pending, target="tensorrt-rtx", sm="86")
    killer.unlink()
    assert digest(pending) == before
    assert os.listdir(pending.parent) == ["e.plan"]


def building(model: Path, path: Path, folder: Path) -> tuple[subprocess.Popen[str], Path]:
    """A compile whose builder runs, and where that works."""
    options = [*("--target", "tensorrt-rtx", "--scheme", "w4a16", "--rotate", "none"), *("--profile", PROFILE)]
    command = [sys.executable, "-c", TELLING, "compile", str(model), "-o", str(path), *options]
    environment = {**os.environ, "TMPDIR": str(folder)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    lines = []
    while (line := process.stderr.readline().strip()) and not line.startswith(f"{folder}{os.sep}"):
        lines.append(line)
    assert line, lines
    place = Path(line)
    deadline = time.monotonic() + 60
    while not workers(place):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, place


def workers(place: Path) -> list[int]:
    """Processes that work there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd").removesuffix(" (deleted)") == str(place):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def left(folder: Path) -> set[str]:
    """What of ours lies there."""
    return {name for name in os.listdir(folder) if "rqc-" in name}


def gone(place: Path) -> bool:
    deadline = time.monotonic() + 30
    while workers(place) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not workers(place)


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found in /proc")
def test_a_compile_that_ends_before_its_time_takes_its_builder_along(
    tiny_model: TinyModel, pending: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted it leaves nothing; killed, what the next compile removes."""
    before, folder = digest(pending), tmp_path / "temporary"
    folder.mkdir()
    process, place = building(tiny_model("llama16"), pending, folder)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "error: interrupted"
    assert gone(place)
    assert not left(folder)
    assert sorted(os.listdir(tmp_path)) == ["e.plan", "temporary"]
    process, place = building(tiny_model("llama16"), pending, folder)
    process.kill()
    process.communicate()
    assert gone(place)
    assert digest(pending) == before
    assert (len(left(tmp_path)), left(folder)) == (1, {place.name})
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    compile_engine(tiny_model("llama16"), pending, **QUICK, scheme="w4a16")
    assert not left(folder)
    assert sorted(os.listdir(tmp_path)) == ["e.plan", "temporary"]
    plan_of(pending)


def test_a_missing_module_is_told_with_the_ways_out(
    rqc: Callable[..., Any], pending: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any weight is read; --portable does without it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith("tensorrt") else find(name, *rest)
    )
    path = pending.parent / "new.plan"
    compiled = ("compile", tiny_model("llama16"), "-o", path, "--rotate", "none", "--scheme", "w4a16")
    done = rqc(*compiled, "--target", "tensorrt-rtx")
    assert done.code == 2
    assert done.err.splitlines()[-2] == "error: building for tensorrt-rtx needs the module tensorrt_rtx"
    hint = done.err.splitlines()[-1]
    assert "pip install 'rqc[tensorrt-rtx]'" in hint
    assert "--portable" in hint
    done = rqc(*compiled, "--target", "tensorrt")
    assert "on the GPU that the plan is for" in done.err.splitlines()[-2]
    assert "--portable" in done.err.splitlines()[-1]
    assert "--target tensorrt-rtx" in done.err.splitlines()[-1]
    with pytest.raises(TargetError, match="needs the module tensorrt_rtx"):
        add_plan(pending, target="tensorrt-rtx")
    assert not path.exists()
    assert rqc(*compiled, "--target", "tensorrt", "--portable").code == 0
    with EngineFile.open(path) as engine:
        assert engine.manifest["target"] == "tensorrt"
        assert engine.manifest["plans"] == []


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        ("1/2", "is no profile"),
        ("1:2/4/8", "is no profile"),
        ("1/8/x", "is no profile"),
        ("2:2:4/1:8:8/16", "the profile's batch is 2:2:4"),
        ("1/4:8:16/32", "the profile's prompt is 4:8:16"),
        ("1/1:9:8/32", "the profile's prompt is 1:9:8"),
        ("0/8/32", "the profile's batch is 1:0:0"),
        ("1/64/32", "prompt of 64 tokens is longer than its context of 32"),
        ("1/64/512", "the profile's context is 512, the model's 256"),
    ],
)
def test_profiles_that_cannot_be_are_refused(
    profile: str, told: str, tiny_model: TinyModel, pending: Path, tmp_path: Path
) -> None:
    options = {**QUICK, "profile": profile}
    with pytest.raises(TargetError, match=told) as raised:
        compile_engine(tiny_model("llama16"), tmp_path / "new.plan", **options)
    assert raised.value.hint
    with pytest.raises(TargetError, match=told):
        add_plan(pending, target="tensorrt-rtx", sm="86", profile=profile)


@pytest.mark.parametrize("option", [["--sm", "86"], ["--profile", PROFILE], ["--portable"], ["--dtype", "fp16"]])
def test_options_of_tensorrt_are_refused_for_onnx(
    option: list[str], rqc: Callable[..., Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    done = rqc("compile", tiny_model("llama16"), "-o", tmp_path / "e.plan", *option)
    assert done.code == 2
    assert done.err.splitlines()[-2] == f"error: {option[0]} is for TensorRT, the target is onnx"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w6a6"])
def test_eight_bits_have_one_scale_per_channel(scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=f"--group-size 32 with --scheme {scheme}") as raised:
        compile_engine(tiny_model("llama16"), tmp_path / "e.plan", **QUICK, scheme=scheme, group_size=32)
    assert raised.value.hint.startswith("--group-size -1")


def test_what_a_plan_cannot_be_made_of_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json") as raised:
        compile_engine(tiny_model("llama-tied"), tmp_path / "e.plan", **QUICK, scheme="w8a8")
    assert "w4a8" in raised.value.hint
    with pytest.raises(SchemeError, match="--scheme fp32 computed in fp16"):
        compile_engine(tiny_model("llama16"), tmp_path / "e.plan", **QUICK, scheme="fp32", dtype="fp16")
    with pytest.raises(InputError, match="--verify-each with --dtype bf16"):
        compile_engine(tiny_model("llama16"), tmp_path / "e.plan", **QUICK, dtype="bf16", verify_each=True)
    with pytest.raises(TargetError, match="no 4-bit weights on SM 75"):
        compile_engine(tiny_model("llama16"), tmp_path / "e.plan", **{**QUICK, "sm": "75"}, scheme="w4a16")
    assert main(["compile", str(tiny_model("llama16")), "-o", str(tmp_path / "onnx.plan"), "--rotate", "none"]) == 0
    with pytest.raises(TargetError, match="was compiled for ONNX Runtime"):
        add_plan(tmp_path / "onnx.plan", target="tensorrt-rtx")
    with pytest.raises(TargetError, match="target 'cuda' has no plans"):
        add_plan(tmp_path / "onnx.plan", target="cuda")
    assert os.listdir(tmp_path) == ["onnx.plan"]


def test_every_pass_of_a_compile_can_be_verified(tiny_model: TinyModel, tmp_path: Path) -> None:
    options = {**QUICK, "portable": True, "scheme": "w4a16", "symmetric": False, "rotate": "r1,r2,r4"}
    report = compile_engine(tiny_model("llama16"), tmp_path / "e.plan", **options, verify_each=True)
    drifts = {record.name: record.drift for record in report.passes}
    assert {"SymmetricCodes", "StoreColumns", "ScatterCache", "CastFloats"} <= drifts.keys()
    assert all(drift is not None for drift in drifts.values())


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({"scheme": "w4a16", "group_size": 128, "sm": "86"}, 4, 4.8),
        ({"scheme": "fp8a16", "sm": "89"}, 8, 8.3),
        ({"scheme": "nvfp4a16", "sm": "120"}, 4.5, 5),
    ],
    ids=["w4a16", "fp8a16", "nvfp4a16"],
)
def test_weights_stay_as_narrow_in_the_plan(
    options: dict[str, Any], least: float, most: float, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Two models that differ by their MLPs alone: what is fixed cancels out, and codes and scales remain."""
    shape = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    sizes, weights = [], []
    for width in (512, 2048):
        directory = tiny_model("llama16", **shape, intermediate_size=width)
        compile_engine(directory, tmp_path / "e.plan", **{**QUICK, **options}, portable=True, clip="none")
        with EngineFile.open(tmp_path / "e.plan") as engine:
            sizes.append(len(build_plan(engine, "tensorrt-rtx", (int(options["sm"]),)).data))
        weights.append(2 * 3 * 1024 * width)
    bits = 8 * (sizes[1] - sizes[0]) / (weights[1] - weights[0])
    assert least < bits <= most
