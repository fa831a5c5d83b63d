"""rqc verify of engines whose keys and values are kept as codes: every form agrees with PyTorch, attention by
attention, and what is wrong on purpose fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tiny import TinyModel, give_voice
from tiny_adapters import save_peft

from rqc.compiler.api import compile_engine
from rqc.compiler.verify import stored_caches
from rqc.compiler.verify.engine import ParityReport, verify_engine
from rqc.passes import int8_cache, token_cache
from rqc.passes.attention import FuseGroupQueryAttention
from rqc.runtime.errors import EngineFormatError

IDS = np.random.Generator(np.random.PCG64(5)).integers(32, 96, 120).tolist()
SHORT = {"calibration_samples": 2, "calibration_length": 64}
ROTATED = {"rotate": "r2,r3,r4"}
CACHE_GATES = {"equal_cache_codes", "cache_code_distance", "attention_error", "cache_error", "ppl_fidelity"}


def checked(directory: Path, folder: Path, cache: str, scheme: str = "w4a16", **options: Any) -> ParityReport:
    adapter = options.get("adapter")
    compile_engine(directory, folder / "e.plan", scheme=scheme, kv_cache=cache, **{**SHORT, **ROTATED, **options})
    return verify_engine(folder / "e.plan", directory, adapter=adapter, token_ids=IDS, tokens=120, window=60, threads=1)


def value(report: ParityReport, name: str) -> float:
    return next(gate.value for gate in report.gates if gate.name == name)


def failed(report: ParityReport) -> set[str]:
    return {gate.name for gate in report.gates if gate.counts and not gate.passed}


@pytest.fixture
def directory(tiny_model: TinyModel) -> Path:
    """A Llama with a tokenizer, which calibration needs."""
    return give_voice(tiny_model("llama16", initializer_range=0.1))


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("llama", "int8"),  # in steps: the kernel takes no heads of 20
        ("gemma2", "int8"),  # window and softcap
        ("phi3", "int8"),  # q, k and v in one
        ("qwen3-16", "int8"),
        ("llama-bias", "int4"),
        ("gemma2", "int4"),
        ("gemma3", "int4"),
        ("mixtral", "int4"),
    ],
)
def test_every_family_agrees_with_pytorch(name: str, cache: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    report = checked(give_voice(tiny_model(name, initializer_range=0.1)), tmp_path, cache)
    assert report.passed, (report.gates, report.notes)
    assert {gate.name for gate in report.gates} >= CACHE_GATES
    assert value(report, "attention_error") < 1e-6


@pytest.mark.parametrize(
    ("scheme", "cache"), [("fp32", "int8"), ("fp16", "int4"), ("w4a8", "int8"), ("w4a8", "int4"), ("w4a4", "int4")]
)
def test_every_scheme_agrees_with_pytorch(scheme: str, cache: str, directory: Path, tmp_path: Path) -> None:
    report = checked(directory, tmp_path, cache, scheme, rotate="none" if scheme == "w4a8" else "r1,r2,r3,r4")
    assert report.passed, (report.gates, report.notes)
    assert "mean_kl" not in {gate.name for gate in report.gates}


def test_an_adapter_lives_beside_a_cache_of_codes(directory: Path, tmp_path: Path) -> None:
    adapter = save_peft(directory, tmp_path / "adapter")
    report = checked(directory, tmp_path, "int8", adapter=adapter, min_survival=-9.0, merge="branch")
    assert report.passed, (report.gates, report.notes)


def test_attention_in_steps_is_that_of_the_kernel_in_8_bits(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel does not fit, 8 bits are kept per token: as close to the float cache as the kernel's."""
    monkeypatch.setattr(FuseGroupQueryAttention, "call", lambda self, model: ir.passes.PassResult(model, False))
    report = checked(directory, tmp_path, "int8")
    assert report.passed, (report.gates, report.notes)
    assert value(report, "cache_error") < 0.01


def test_a_cache_that_is_not_on_its_grid_fails(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = token_cache._Lowering._codes

    def coarser(self: Any, x: ir.Value) -> Any:
        self.top = 13.0
        return lowered(self, x)

    monkeypatch.setattr(token_cache._Lowering, "_codes", coarser)
    assert {"equal_cache_codes"} <= failed(checked(directory, tmp_path, "int4"))


@pytest.mark.parametrize("factor", [0.125, 64.0])
def test_scales_that_do_not_fit_fail(
    factor: float, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_cache, "LIMIT", 127 / factor)
    assert "cache_error" in failed(checked(directory, tmp_path, "int8"))


@pytest.mark.parametrize("moved", ["past_key_values.1.value.scale"])
def test_scales_that_the_kernel_does_not_use_fail(
    moved: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the reference rounds with is read from the engine; here it reads something else than the kernel."""
    array = stored_caches.StoredGraph.array

    def other(self: Any, value: ir.Value | None) -> Any:
        found = array(self, value)
        return found * np.float32(1.03) if value is not None and value.name == moved else found

    monkeypatch.setattr(stored_caches.StoredGraph, "array", other)
    assert "equal_cache_codes" in failed(checked(directory, tmp_path, "int8"))


def test_an_engine_that_rounds_less_than_it_says_is_refused(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_cache.Int8Cache, "call", lambda self, model: ir.passes.PassResult(model, False))
    with pytest.raises(EngineFormatError, match="0 of 2 attentions round their cache, which is int8"):
        checked(directory, tmp_path, "int8")
