"""rqc verify with an adapter: every way into an engine agrees with the PEFT model; what is wrong on purpose fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tiny import TinyModel
from tiny_adapters import basis_of, checked, failed, random_deltas, save_peft, verified

from rqc.compiler import pipeline
from rqc.compiler.adapters import merge as merges
from rqc.compiler.api import compile_engine
from rqc.compiler.cli import main
from rqc.compiler.importer import import_model
from rqc.compiler.verify.engine import ParityReport
from rqc.models import quantized as lazy_quantized
from rqc.models.adapter import Adapter, write_adapter
from rqc.models.adapter_names import torch_names
from rqc.models.delta import Delta, row_norms
from rqc.models.grid import Grid, quantize
from rqc.models.loftq import loftq
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.passes import branches, zero_points
from rqc.passes.base import BRANCH_A, ONLINE
from rqc.runtime.errors import InputError

Fault = Callable[[pytest.MonkeyPatch], None]
ALL = "r1,r2,r3,r4"
W4, W4_OFFSET = Grid(4, 16, True, "mse"), Grid(4, 16, False, "none")
W3, W2 = Grid(3, 32, True, "none"), Grid(2, 32, False, "mse")


def in_basis(
    directory: Path,
    adapter: Path,
    sites: str,
    grid: Grid | None,
    *,
    dora: bool = False,
    residual: bool = False,
    **options: Any,
) -> Path:
    """An adapter as `rqc finetune` leaves it, with random weights, of the rotated and quantized model."""
    kind = "qalora" if "pool" in options else "dora" if dora else "lora"
    fields = {"grid": grid, "base_kind": "float" if grid is None else f"w{grid.bits}", "adapter_type": kind}
    basis = basis_of(directory, sites, residual=residual, **fields)
    deltas, removed = random_deltas(directory, **options), dict[str, Delta]()
    reference = Reference.load(directory)
    reference.fold(Rotation.parse(sites), tied=reference.description.architecture.tied)
    draw = np.random.default_rng(3)
    for name, delta in deltas.items():
        w = reference.read(name)
        if residual:
            assert grid is not None
            start = loftq(w, grid, 4, 2, scale=2.0)
            assert start.residual is not None
            deltas[name], removed[name] = start.delta, start.residual
        elif dora:
            base = w if grid is None else quantize(w, grid).dequantize()
            norms = row_norms(base + delta.dense())
            deltas[name] = replace(delta, magnitude=norms * draw.uniform(0.7, 1.4, len(norms)))
    names = torch_names(import_model(directory).description)
    write_adapter(adapter, deltas, basis, torch_names=names, residual=removed or None)
    return adapter


def value(report: ParityReport, name: str) -> float:
    return next(gate.value for gate in report.gates if gate.name == name)


@pytest.mark.parametrize("sites", ["none", ALL])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", ["llama-tied", "phi3"])
def test_adapters_of_plain_peft_folded(
    name: str, config: dict[str, Any], sites: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model(name, initializer_range=0.1)
    adapter = save_peft(directory, tmp_path / "adapter", **config)
    report = checked(directory, adapter, tmp_path, scheme="fp32", rotate=sites)
    assert report.passed
    assert report.mean_kl <= 1e-7
    report = checked(directory, adapter, tmp_path, scheme="w4a16" if sites == "none" else "w4a8", rotate=sites)
    assert report.passed, (report.gates, report.notes)
    assert value(report, "adapter_kl") <= 1e-9


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(("llama-bias", scheme) for scheme in ("fp32", "fp16", "w8a16", "w4a16", "w8a8", "w4a8", "w6a6", "w4a4")),
        *((name, scheme) for name in ("phi3", "mixtral") for scheme in ("w4a16", "w4a8", "w4a4")),
    ],
)
def test_branches(name: str, scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model(name, initializer_range=0.1)
    targets = {"target_modules": ["q_proj", "v_proj", "o_proj"]} if name == "mixtral" else {}
    adapter = save_peft(directory, tmp_path / "adapter", **targets)
    report = checked(directory, adapter, tmp_path, scheme=scheme, rotate=ALL, merge="branch")
    assert report.passed, (report.gates, report.notes)
    if not scheme.endswith(("a8", "a6", "a4")):
        assert report.mean_kl <= 1e-9


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w4a4"])
def test_branches_before_norms_of_the_output(scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("gemma2", initializer_range=0.1)
    adapter = save_peft(directory, tmp_path / "adapter")
    report = checked(directory, adapter, tmp_path, scheme=scheme, rotate="r2,r3,r4", merge="branch")
    assert report.passed, (report.gates, report.notes)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("tied", [True, False])
def test_adapters_of_the_head(tied: bool, config: dict[str, Any], tiny_model: TinyModel, tmp_path: Path) -> None:
    """Those of a head that shares its table need one of its own: what they add must not reach the embedding."""
    directory = tiny_model("llama-tied" if tied else "llama", initializer_range=0.1)
    adapter = save_peft(directory, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "lm_head"], **config)
    for scheme, sites in (("fp32", ALL), ("w4a16", ALL), ("w4a8", "r4")):
        report = checked(directory, adapter, tmp_path, scheme=scheme, rotate=sites, tied="untie" if tied else "keep")
        assert report.passed, (report.gates, report.notes)


@pytest.mark.parametrize("scheme", ["fp32", "w4a16", "w4a8"])
def test_adapters_of_experts(scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("qwen3-moe", initializer_range=0.1)
    adapter = in_basis(directory, tmp_path / "adapter", "r1,r4", None)
    report = checked(directory, adapter, tmp_path, scheme=scheme, merge="fold" if scheme == "fp32" else "branch")
    assert report.passed, (report.gates, report.notes)
    assert not any(note.startswith("peft cannot open") for note in report.notes)


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "fp32"},
        {"scheme": "w4a8", "merge": "branch"},
        {"scheme": "w4a16", "rotate": "none", "merge": "branch"},
        {"scheme": "w4a16", "rotate": ALL, "merge": "branch"},
        {"scheme": "w4a8", "rotate": ALL, "merge": "fold"},
        {"scheme": "fp32", "rotate": "r4", "rotation_seed": 3},
        {"scheme": "w4a16", "tied": "untie", "merge": "branch"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_adapters_of_a_basis_in_it_and_in_others(
    options: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model("llama-tied", initializer_range=0.1)
    report = checked(directory, in_basis(directory, tmp_path / "adapter", "r1,r4", None), tmp_path, **options)
    assert report.passed, (report.gates, report.notes)
    if options["scheme"] == "fp32":
        assert report.mean_kl <= 1e-7


@pytest.mark.parametrize(
    ("grid", "schemes", "name", "dora"),
    [
        (W4, ("w4a16", "w4a8", "w4a4"), "llama-tied", False),
        (W4, ("w4a16", "w4a8", "w4a4"), "phi3", True),
        (W4_OFFSET, ("w4a16", "w4a8"), "llama-tied", True),
        (W4_OFFSET, ("w4a16",), "phi3", False),
        (W3, ("w3a16",), "llama-tied", False),
        (W2, ("w2a16",), "phi3", True),
    ],
)
def test_zero_points_that_moved(
    grid: Grid, schemes: tuple[str, ...], name: str, dora: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model(name, initializer_range=0.1)
    adapter = in_basis(directory, tmp_path / "adapter", "r1,r4", grid, dora=dora, pool=grid.group_size, size=0.5)
    for scheme in schemes:
        report = checked(directory, adapter, tmp_path, scheme=scheme, merge="zero-point")
        assert report.passed, (report.gates, report.notes)
        assert value(report, "misplaced_codes") == 0
        assert any(found.name.endswith("correction") for found in report.weights)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w4a4"])
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"residual": True}], ids=["lora", "dora", "loftq"])
def test_adapters_beside_the_grid_that_they_were_trained_on(
    options: dict[str, Any], scheme: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model("llama-tied", initializer_range=0.1)
    adapter = in_basis(directory, tmp_path / "adapter", "r1,r4", W4, **options)
    report = checked(directory, adapter, tmp_path, scheme=scheme, merge="branch")
    assert report.passed, (report.gates, report.notes)


def test_the_reference_is_the_model_that_was_trained(tiny_model: TinyModel, tmp_path: Path) -> None:
    """On a quantized base the engine computes the same function, so its perplexity is the reference's."""
    directory = tiny_model("llama-tied", initializer_range=0.1)
    adapter = in_basis(directory, tmp_path / "adapter", "r1,r4", W2, residual=True)
    report = checked(directory, adapter, tmp_path, scheme="w2a16", embedding_bits=32)
    assert report.passed
    assert report.ppl_engine == pytest.approx(report.ppl_reference, rel=1e-5)


def test_a_pooled_adapter_that_peft_cannot_open_is_converted(tiny_model: TinyModel, tmp_path: Path) -> None:
    """QA-LoRA's own A is compact [r, in / g], and pools by means."""
    from safetensors.numpy import load_file, save_file

    directory = tiny_model("llama-tied", initializer_range=0.1, intermediate_size=160)
    adapter = save_peft(directory, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    compact = {name: t[:, ::16].copy() if "lora_A" in name else t for name, t in tensors.items()}
    save_file(compact, adapter / "adapter_model.safetensors")
    report = checked(directory, adapter, tmp_path, scheme="w4a16", group_size=16, rotate="none", merge="zero-point")
    assert report.passed, report.notes
    assert any(note.startswith("peft cannot open") for note in report.notes)


# What is wrong on purpose


def forget_adapter(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(merges.Merge, "after_grid", lambda self, rotation: [])


def scale_branches(patch: pytest.MonkeyPatch) -> None:
    plain = branches.Branch.b
    patch.setattr(branches.Branch, "b", lambda self: plain(self) * np.float32(1.001))


def carry_nowhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(merges, "to_frame", lambda name, delta, *frame: delta)


def read_before_the_rotation(patch: pytest.MonkeyPatch) -> None:
    """The branch's A on x as it is in front of the online rotation."""
    plain = branches.AddBranches.call

    def call(self: Any, model: ir.Model) -> Any:
        result = plain(self, model)
        for node in model.graph:
            while BRANCH_A in node.metadata_props and (before := online(node)) is not None:
                node.replace_input_with(0, before)
        return result

    def online(node: ir.Node) -> ir.Value | None:
        x = node.inputs[0]
        producer = x.producer() if x is not None else None
        turned = producer is not None and producer.metadata_props.get(ONLINE) == "r4"
        return next(v for v in producer.inputs if v is not None and not v.is_initializer()) if turned else None

    patch.setattr(branches.AddBranches, "call", call)


def another_adapter(patch: pytest.MonkeyPatch) -> None:
    plain = pipeline.open_adapter

    def opened(*arguments: Any) -> Any:
        recipe, merge = plain(*arguments)
        (part,) = merge.parts
        deltas = {name: replace(delta, b=delta.b[::-1].copy()) for name, delta in part.deltas.items()}
        return recipe, replace(merge, parts=(replace(part, deltas=deltas),))

    patch.setattr(pipeline, "open_adapter", opened)


def no_correction(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(zero_points, "correct", lambda *arguments: None)


def move_one_zero_point(patch: pytest.MonkeyPatch) -> None:
    """One in every weight, by one, with the correction as it was."""
    plain = lazy_quantized.merge_zero_points

    def merge(quantized: Any, offset: Any) -> Any:
        zeros, correction = plain(quantized, offset)
        zeros[0, 1] ^= 1
        return zeros, correction

    patch.setattr(lazy_quantized, "merge_zero_points", merge)


def shrink_corrections(patch: pytest.MonkeyPatch) -> None:
    plain = lazy_quantized.merge_zero_points

    def merge(quantized: Any, offset: Any) -> Any:
        zeros, correction = plain(quantized, offset)
        return zeros, correction * np.float32(0.99)

    patch.setattr(lazy_quantized, "merge_zero_points", merge)


def forget_magnitudes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lazy_quantized, "magnitude_ratio", lambda magnitude, norms: np.ones_like(norms))


BRANCH_FAULTS = (forget_adapter, scale_branches, another_adapter, carry_nowhere, read_before_the_rotation)
ZERO_POINT_FAULTS = (no_correction, move_one_zero_point, shrink_corrections, another_adapter)


@pytest.fixture
def wrongly(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ParityReport]:
    """Compile a tiny Llama and an adapter (plain peft's, or `in_basis`) with a fault, unmeasured; verify without it."""

    def check(fault: Fault, scheme: str, basis: Mapping[str, Any] | None = None, **options: Any) -> ParityReport:
        directory, adapter = tiny_model("llama", initializer_range=0.1), tmp_path / "adapter"
        if basis is None:
            save_peft(directory, adapter)
        else:
            in_basis(directory, adapter, "r1,r4", W4, **basis)
        with monkeypatch.context() as patch:
            fault(patch)
            patch.setattr(pipeline, "survival_of", lambda *arguments: {"": 1.0})
            compile_engine(directory, tmp_path / "e.plan", adapter=adapter, scheme=scheme, **options)
        return verified(tmp_path / "e.plan", directory, adapter)

    return check


@pytest.mark.parametrize(
    ("fault", "scheme"),
    [
        *((fault, "w4a16") for fault in BRANCH_FAULTS),
        *((fault, scheme) for fault in (scale_branches, read_before_the_rotation) for scheme in ("w4a8", "w4a4")),
    ],
)
def test_a_wrong_branch_fails(fault: Fault, scheme: str, wrongly: Callable[..., ParityReport]) -> None:
    report = wrongly(fault, scheme, rotate=ALL, merge="branch")
    wrong = {"forget_adapter": "misplaced_codes", "read_before_the_rotation": "mean_kl"}.get(fault.__name__, "weights")
    if scheme != "w4a16" and wrong == "mean_kl":
        wrong = "equal_codes" if scheme == "w4a8" else "linear_error"
    assert not report.passed
    assert wrong in failed(report), report.gates


@pytest.mark.parametrize(
    ("fault", "scheme"),
    [*((fault, "w4a16") for fault in ZERO_POINT_FAULTS), (no_correction, "w4a8"), (shrink_corrections, "w4a4")],
)
def test_a_wrong_zero_point_merge_fails(fault: Fault, scheme: str, wrongly: Callable[..., ParityReport]) -> None:
    report = wrongly(fault, scheme, {"pool": 16, "size": 0.5}, merge="zero-point")
    assert not report.passed
    assert failed(report) & {"weights", "misplaced_codes"}, report.gates


@pytest.mark.parametrize("pool", [{}, {"pool": 16}], ids=["branch", "zero-point"])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_rows_that_a_dora_does_not_scale_fail(
    scheme: str, pool: Mapping[str, int], wrongly: Callable[..., ParityReport]
) -> None:
    report = wrongly(forget_magnitudes, scheme, {"dora": True, **pool})
    assert {"weights", "misplaced_codes"} <= failed(report)


@pytest.mark.parametrize("scheme", ["fp32", "fp16", "w4a16", "w4a8"])
def test_a_folded_adapter_that_is_another_one_fails(scheme: str, wrongly: Callable[..., ParityReport]) -> None:
    report = wrongly(another_adapter, scheme, rotate="r4", merge="fold")
    assert not report.passed
    assert ("mean_kl" if scheme == "fp32" else "weights" if scheme == "fp16" else "misplaced_codes") in failed(report)


# What cannot be compared


def test_engine_and_adapter_must_belong_together(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama")
    adapter = save_peft(directory, tmp_path / "adapter")
    other = save_peft(directory, tmp_path / "other", seed=1)
    compile_engine(directory, tmp_path / "e.plan", adapter=adapter, scheme="fp32")
    compile_engine(directory, tmp_path / "plain.plan", scheme="fp32")
    fingerprint = Adapter.open(adapter, import_model(directory).description).fingerprint[:12]
    with pytest.raises(InputError, match=f"holds the adapter {fingerprint}, none was given"):
        verified(tmp_path / "e.plan", directory, None)
    with pytest.raises(InputError, match=r"holds no adapter, .*adapter was given"):
        verified(tmp_path / "plain.plan", directory, adapter)
    with pytest.raises(InputError, match=rf"holds the adapter {fingerprint}, .*other is [0-9a-f]{{12}}"):
        verified(tmp_path / "e.plan", directory, other)
    with pytest.raises(InputError, match="is not an adapter directory"):
        verified(tmp_path / "e.plan", directory, tmp_path / "nowhere")
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    assert verified(tmp_path / "e.plan", directory, moved).passed


def test_the_command_line_takes_the_adapter(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_model("llama")
    adapter, engine = save_peft(directory, tmp_path / "adapter"), tmp_path / "e.plan"
    compile_engine(directory, engine, adapter=adapter, scheme="fp32")
    assert main(["verify", str(engine), str(directory)]) == 2
    told = capsys.readouterr().err
    assert "none was given" in told
    assert "--adapter DIR" in told
    compile_engine(directory, engine, scheme="fp32")
    assert main(["verify", str(engine), str(directory), "--adapter", str(adapter)]) == 2
    assert "holds no adapter" in capsys.readouterr().err
