"""Engines with branches of their own: what is compiled is what PyTorch computes with the same codes and branches, and
what is not fails by the gate that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TinyModel, give_voice
from tiny_adapters import save_peft

from rqc.compiler.api import compile_engine
from rqc.compiler.calibration import solver
from rqc.compiler.calibration.findings import Findings
from rqc.compiler.verify import stored_sides
from rqc.compiler.verify.engine import ParityReport, verify_engine
from rqc.models.delta import Delta
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import InputError, SchemeError
from rqc.runtime.inspection import inspect_engine

QUICK: dict[str, Any] = {"calibration_samples": 4, "calibration_length": 48, "clip": "none", "rotate": "none"}
EORA: dict[str, Any] = {"compensate": "eora", "compensate_rank": 8}


def verified(model: Path, folder: Path, **options: Any) -> ParityReport:
    """Compile and compare."""
    engine, adapter = folder / "e.plan", options.get("adapter")
    compile_engine(give_voice(model), engine, **{**QUICK, **options})
    ids = np.random.default_rng(3).integers(3, 96, 96).tolist()
    return verify_engine(engine, model, adapter=adapter, token_ids=ids, tokens=96, window=48)


def failed(report: ParityReport) -> set[str]:
    return {gate.name for gate in report.gates if gate.counts and not gate.passed}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "w3": ("llama-bias", {"scheme": "w3a16", **EORA}),
    "budget": ("phi3", {"scheme": "w4a16", "rotate": "r1,r4", "compensate": "eora", "compensate_budget": 3.0}),
    "w4a8": ("llama16", {"scheme": "w4a8", "rotate": "r1,r4", **EORA}),
    "w4a8 of experts": ("mixtral", {"scheme": "w4a8", **EORA}),
    "w4a4": ("gemma2", {"scheme": "w4a4", "rotate": "r2,r4", **EORA, "method": "gptq"}),
    "w4a4 rounded to nearest": ("llama16", {"scheme": "w4a4", "rotate": "r1,r4", **EORA}),
    "w4a4 clipped": ("llama16", {"scheme": "w4a4", "method": "gptq", "activation_clip": 0.1}),
    "w4a4 sparse": ("llama16", {"scheme": "w4a4", "method": "gptq", "sparsity": "2:4", "prune": "magnitude"}),
    "loftq": ("qwen2", {"scheme": "w2a16", "compensate": "loftq", "compensate_budget": 3.0}),
    "sparse": ("llama16", {"scheme": "w4a16", "sparsity": "2:4", **EORA}),
    "sparse gptq": ("phi3", {"scheme": "w4a16", "sparsity": "2:4", "method": "gptq", "symmetric": False}),
    "sparse w4a8": ("llama16", {"scheme": "w4a8", "sparsity": "2:4", "prune": "magnitude", **EORA}),
    "tensorrt": ("llama16", {"scheme": "w4a16", "target": "tensorrt-rtx", "portable": True, **EORA}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_engine_is_its_own_fake_quantization(case: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    name, options = CASES[case]
    report = verified(tiny_model(name), tmp_path, **options)
    assert report.passed, [(gate.name, gate.value, gate.limit) for gate in report.gates if not gate.passed]
    if options["scheme"].endswith("a16") and "target" not in options:
        assert report.mean_kl <= 1e-9


def test_a_branch_of_codes_beside_one_of_floats(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k and v share a product, which stays in floats where codes would lose something of one of them alone: the
    kernels of the others round what it gives, not what it reads."""
    keep = Findings.add_branch

    def mixed(self: Findings, name: str, delta: Delta, *, coded: bool) -> None:
        keep(self, name, delta, coded=not name.endswith(("v_proj.weight", "up_proj.weight")))

    monkeypatch.setattr(Findings, "add_branch", mixed)
    report = verified(tiny_model("llama16"), tmp_path, scheme="w4a8", **EORA)
    assert report.passed, [(gate.name, gate.value, gate.limit) for gate in report.gates if not gate.passed]


def test_branches_bring_the_engine_nearer_to_the_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama16")
    reports = [verified(model, tmp_path, scheme="w2a16", **options) for options in ({}, EORA)]
    base = [gate.value for report in reports for gate in report.gates if gate.name == "ppl_ratio"]
    assert reports[1].passed
    assert abs(base[1] - 1) < abs(base[0] - 1)


def test_what_is_inside_is_said(tiny_model: TinyModel, tmp_path: Path) -> None:
    verified(tiny_model("llama16"), tmp_path, scheme="w4a16", sparsity="2:4", **EORA)
    found = inspect_engine(tmp_path / "e.plan")
    assert "2:4 by wanda" in found.to_text()
    assert "eora, rank 8 beside 14 linears" in found.to_text()
    assert found.to_json()["compensation"] == {"method": "eora", "rank": 8, "least_rank": 8, "linears": 14}
    names = [str(row["name"]) for row in found.layers]
    inputs = 2 * 4  # layers, values that linears read: one product each, two where its codes are planes
    assert inputs < sum(name.endswith("branch A") for name in names) <= 2 * inputs
    with EngineFile.open(tmp_path / "e.plan") as file:
        assert file.manifest["sparsity"] == {"pattern": "2:4", "prune": "wanda"}


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_a_folded_adapter_is_compensated_with_its_weights(scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama16", initializer_range=0.1)
    adapter = save_peft(model, tmp_path / "adapter")
    report = verified(model, tmp_path, scheme=scheme, adapter=adapter, **EORA)
    assert report.passed, [(gate.name, gate.value, gate.limit) for gate in report.gates if not gate.passed]


def test_an_adapter_beside_the_grid_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama16")
    adapter = save_peft(model, tmp_path / "adapter")
    for options in (EORA, {"sparsity": "2:4"}):
        with pytest.raises(SchemeError, match="with --merge branch") as raised:
            verified(model, tmp_path, scheme="w4a16", adapter=adapter, merge="branch", **options)
        assert "--merge fold" in raised.value.hint


def test_a_budget_that_buys_nothing_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="buys no branch"):
        verified(tiny_model("llama16"), tmp_path, scheme="w4a16", compensate="eora", compensate_budget=1e-3)


def test_without_a_text_to_measure_on(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--compensate eora looks at calibration text"):
        compile_engine(tiny_model("llama16"), tmp_path / "e.plan", **QUICK, **EORA)


def test_a_branch_of_another_weight_fails(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what stands in the file, so that logits agree; but it makes up for nothing."""
    keep = Findings.add_branch

    def wrong(self: Findings, name: str, delta: Delta, *, coded: bool) -> None:
        keep(self, name, Delta(delta.a[:, ::-1], 30 * delta.b), coded=coded)

    monkeypatch.setattr(Findings, "add_branch", wrong)
    assert failed(verified(tiny_model("llama16"), tmp_path, scheme="w4a16", **EORA)) == {"weights"}


def test_groups_with_three_weights_fail(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "two_of_four", lambda w, norms: np.arange(w.shape[1])[None] % 4 < 3)
    assert failed(verified(tiny_model("llama16"), tmp_path, scheme="w4a16", sparsity="2:4", **EORA)) == {"sparsity"}


def test_a_branch_that_rounds_unseen_fails(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kernels round in the engine, PyTorch must round too."""
    monkeypatch.setattr(stored_sides, "_block", lambda node: None)
    found = verified(tiny_model("llama16", initializer_range=0.1), tmp_path, scheme="w4a8", sparsity="2:4", **EORA)
    assert "linear_error" in failed(found)
