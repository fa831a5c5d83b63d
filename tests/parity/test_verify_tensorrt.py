"""rqc verify of engines for TensorRT: their ONNX part agrees with PyTorch, and what is wrong on purpose fails."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import safetensors.numpy
from tiny import TinyModel, give_voice
from tiny_adapters import basis_of, failed, random_deltas, save_peft, talking, verified

from rqc.compiler.api import compile_engine
from rqc.compiler.importer import import_model
from rqc.compiler.verify.engine import ParityReport
from rqc.models import float_grid
from rqc.models.adapter import write_adapter
from rqc.models.adapter_names import torch_names
from rqc.models.float_grid import FloatGrid, FloatQuantized
from rqc.models.grid import Grid
from rqc.models.packing import Quantized
from rqc.passes import branches, float4, store_columns, symmetric_codes
from rqc.passes.activations import QuantizeActivations
from rqc.passes.rotate import Rotate
from rqc.passes.static_activations import StaticActivations
from rqc.runtime.errors import EngineFormatError, SchemeError, TargetError

ALL = "r1,r2,r3,r4"
PORTABLE: dict[str, Any] = {"target": "tensorrt-rtx", "portable": True}
SHORT = {"calibration_samples": 2, "calibration_length": 32}
FLOATS = ("fp8a16", "nvfp4a16")
NOTE = "the engine's ONNX part was compared, run by ONNX Runtime: not a TensorRT plan"


def checked(directory: Path, folder: Path, scheme: str, adapter: Any = None, **options: Any) -> ParityReport:
    """Compile for TensorRT without a plan, and verify."""
    given = {"rotate": ALL, **PORTABLE, **options}
    given |= SHORT if scheme == "w8a8" else {}
    given |= {} if adapter is None else {"min_survival": 0.0}
    compile_engine(directory, folder / "e.plan", adapter=adapter, scheme=scheme, **given)
    return verified(folder / "e.plan", directory, adapter)


def value(report: ParityReport, name: str) -> float:
    return next(gate.value for gate in report.gates if gate.name == name)


@pytest.fixture
def directory(tiny_model: TinyModel) -> Path:
    """A tied Llama with a tokenizer, which calibration needs."""
    return give_voice(tiny_model("llama-tied", initializer_range=0.1))


@pytest.mark.parametrize(
    "scheme", ["fp32", "fp16", "w8a16", "w8a8", "w6a6", "w4a16", "w4a8", "w4a4", "w3a16", "w2a16", *FLOATS]
)
def test_every_scheme_agrees_with_pytorch(scheme: str, directory: Path, tmp_path: Path) -> None:
    report = checked(directory, tmp_path, scheme)
    assert report.passed, (report.gates, report.notes)
    assert NOTE in report.notes
    if scheme.endswith(("a16", "p16")):
        assert value(report, "mean_kl") < 1e-5  # PyTorch's own fp16 is as far off


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("w4a16", {"symmetric": False, "rotate": "none"}),
        ("w4a16", {"group_size": 128, "tied": "untie", "embedding_bits": 16}),
        ("w4a16", {"group_size": -1, "dtype": "fp32", "rotate": "r1"}),
        ("w4a8", {"symmetric": False, "group_size": 128}),
        ("w4a8", {"rotate": "none", "embedding_bits": 4}),
        ("w6a6", {"symmetric": False, "tied": "untie", "dtype": "fp32"}),
        ("w8a8", {"symmetric": False}),
        ("w2a16", {"symmetric": False, "clip": "none", "group_size": -1}),
        ("fp8a16", {"clip": "none", "dtype": "fp32", "tied": "untie"}),
        ("nvfp4a16", {"dtype": "fp32", "embedding_bits": 4}),
        ("nvfp4a16", {"clip": "none", "rotate": "none", "embedding_bits": 16}),
    ],
    ids=str,
)
def test_every_form_of_storage_is_read_back(
    scheme: str, options: dict[str, Any], directory: Path, tmp_path: Path
) -> None:
    report = checked(directory, tmp_path, scheme, **options)
    assert report.passed, (report.gates, report.notes)
    if options.get("dtype") == "fp32":
        assert value(report, "linear_error" if scheme == "w6a6" else "mean_kl") < 1e-6


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "nvfp4a16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "mixtral"])
def test_every_kind_of_family_agrees_with_pytorch(
    name: str, scheme: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    sites = "r2,r3,r4" if name == "gemma2" else ALL
    report = checked(tiny_model(name, initializer_range=0.1), tmp_path, scheme, rotate=sites)
    assert report.passed, (report.gates, report.notes)


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("fp16", {"merge": "branch"}),
        ("w4a16", {"merge": "branch", "symmetric": False}),
        ("w4a8", {"merge": "branch"}),
        ("w8a8", {"merge": "branch"}),
        ("w4a4", {"merge": "branch", "symmetric": False}),
        ("w4a16", {"merge": "fold"}),
        ("w4a8", {"merge": "fold", "symmetric": False}),
        ("fp8a16", {"merge": "branch"}),
        ("nvfp4a16", {"merge": "branch"}),
        ("nvfp4a16", {"merge": "fold"}),
    ],
    ids=str,
)
def test_adapters_folded_and_beside(scheme: str, options: dict[str, Any], directory: Path, tmp_path: Path) -> None:
    report = checked(directory, tmp_path, scheme, save_peft(directory, tmp_path / "adapter"), **options)
    assert report.passed, (report.gates, report.notes)


def test_a_dora_runs_beside_scales_that_can_be_any_number_and_no_others(directory: Path, tmp_path: Path) -> None:
    adapter = save_peft(directory, tmp_path / "adapter", use_dora=True)
    report = checked(directory, tmp_path, "fp8a16", adapter, merge="branch", rotate="none")
    assert report.passed, (report.gates, report.notes)
    with pytest.raises(SchemeError, match="scales of NVFP4 are 8-bit floats") as raised:
        checked(directory, tmp_path, "nvfp4a16", adapter, merge="branch", rotate="none")
    assert raised.value.hint == "--merge fold"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_pooled_adapters_in_zero_points(scheme: str, symmetric: bool, directory: Path, tmp_path: Path) -> None:
    deltas = random_deltas(directory, pool=16, size=0.5)
    names = torch_names(import_model(directory).description)
    grid = Grid(4, 16, symmetric, "mse")
    basis = basis_of(directory, "r1,r4", grid=grid, base_kind="w4", adapter_type="qalora")
    write_adapter(tmp_path / "adapter", deltas, basis, torch_names=names)
    options: dict[str, Any] = {"merge": "zero-point", "rotate": "r1,r4", "group_size": 16, "symmetric": symmetric}
    report = checked(directory, tmp_path, scheme, tmp_path / "adapter", **options)
    assert report.passed, (report.gates, report.notes)


def test_adapters_that_are_switched(directory: Path, tmp_path: Path) -> None:
    both = {name: save_peft(directory, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    report = checked(directory, tmp_path, "w4a8", both, symmetric=False)
    assert report.passed, (report.gates, report.notes)
    assert set(report.each) == {"base", "a", "b"}


def test_a_compile_verifies(directory: Path, tmp_path: Path) -> None:
    folder = talking(directory, tmp_path / "model")
    report = compile_engine(folder, tmp_path / "e.plan", scheme="w4a16", rotate="none", verify=True, **PORTABLE)
    assert report.parity is not None
    assert report.parity["passed"]


def test_bf16_is_not_compared_on_a_cpu(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="computes in bf16, for which ONNX Runtime has no kernels"):
        checked(directory, tmp_path, "w4a16", dtype="bf16")


# What is wrong on purpose


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_one_forged_scale_fails(scheme: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, forged = store_columns.positive_scales, list[bool]()

    def scales(quantized: Quantized) -> np.ndarray:
        made = plain(quantized).copy()
        if quantized.bits == 4 and not forged:
            forged.append(True)
            made[3, 1] *= 1.2
        return made

    monkeypatch.setattr(store_columns, "positive_scales", scales)
    assert "misplaced_codes" in failed(checked(directory, tmp_path, scheme))


@pytest.mark.parametrize(("scheme", "part"), [("fp8a16", "codes"), ("nvfp4a16", "codes"), ("nvfp4a16", "scale_codes")])
def test_one_forged_float_fails(
    scheme: str, part: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One code of a weight, or one scale, is two further on."""
    plain = float_grid.quantize_floats

    def quantized(w: np.ndarray, grid: FloatGrid) -> FloatQuantized:
        made = plain(w, grid)
        found = made.codes if part == "codes" else made.scale_codes()
        found[3, 1] ^= 2
        if part != "codes":
            made.scales[:] = float_grid.E4M3.values(found) * np.float32(made.unit)
        return made

    monkeypatch.setattr(float_grid, "quantize_floats", quantized)
    assert "misplaced_codes" in failed(checked(directory, tmp_path, scheme))


def test_another_scale_of_a_whole_tensor_fails(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = float4._unit
    monkeypatch.setattr(float4, "_unit", lambda quantized: plain(quantized) * np.float32(1.2))
    assert "misplaced_codes" in failed(checked(directory, tmp_path, "nvfp4a16"))


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_a_missing_correction_fails(
    scheme: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symmetric_codes, "correct", lambda *arguments: None)
    assert failed(checked(directory, tmp_path, scheme, symmetric=False)) & {"weights", "misplaced_codes"}


def test_a_correction_that_is_off_fails(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = symmetric_codes.left_over
    monkeypatch.setattr(symmetric_codes, "left_over", lambda quantized: plain(quantized) * np.float32(1.02))
    assert failed(checked(directory, tmp_path, "w4a16", symmetric=False)) & {"weights", "misplaced_codes"}


@pytest.mark.parametrize("scheme", ["fp16", "w4a16", "w8a8", *FLOATS])
def test_weights_that_changed_unseen_fail(scheme: str, directory: Path, tmp_path: Path) -> None:
    compile_engine(
        directory, tmp_path / "e.plan", scheme=scheme, rotate=ALL, **PORTABLE, **(SHORT if scheme == "w8a8" else {})
    )
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[1:] = 0.1 * np.random.default_rng(0).standard_normal(weight[1:].shape)  # the first row tells models apart
    safetensors.numpy.save_file(tensors, other / "model.safetensors", {"format": "pt"})
    report = verified(tmp_path / "e.plan", other, None)
    assert "weights" in failed(report)
    assert "up_proj" in max(report.weights, key=lambda found: found.strain).name


@pytest.mark.parametrize(
    ("scheme", "wrong"),
    [("fp32", "mean_kl"), ("fp16", "mean_kl"), ("w4a16", "mean_kl"), ("nvfp4a16", "mean_kl"), ("w4a8", "equal_codes")],
)
def test_a_rotation_without_its_online_half_fails(
    scheme: str, wrong: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rotate, "_online", lambda self, model, tied: None)
    report = checked(directory, tmp_path, scheme)
    assert wrong in failed(report)
    if wrong == "mean_kl":
        assert value(report, wrong) > 0.1


@pytest.mark.parametrize("scheme", ["w4a8", "w6a6"])
def test_activations_that_are_not_rounded_fail(
    scheme: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QuantizeActivations, "call", lambda _, model: ir.passes.PassResult(model, modified=False))
    assert "linear_error" in failed(checked(directory, tmp_path, scheme))


def test_static_activations_that_are_not_rounded_are_refused(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StaticActivations, "call", lambda _, model: ir.passes.PassResult(model, modified=False))
    with pytest.raises(EngineFormatError, match="is not rounded"):
        checked(directory, tmp_path, "w8a8")


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_a_wrong_branch_fails(scheme: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = branches.Branch.b
    monkeypatch.setattr(branches.Branch, "b", lambda self: plain(self) * np.float32(1.01))
    report = checked(directory, tmp_path, scheme, save_peft(directory, tmp_path / "adapter"), merge="branch")
    assert "weights" in failed(report)
