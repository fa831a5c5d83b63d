"""`--device`: blocks run on the GPU that ONNX Runtime has, or a compile ends before it has cost anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from tiny import give_voice

from rqc.compiler.api import compile_engine
from rqc.compiler.calibration.device import CPU, CUDA
from rqc.runtime.errors import InputError, ResourceError

GPTQ: dict[str, Any] = {"method": "gptq", "rotate": "none", "calibration_samples": 2, "calibration_length": 16}


def test_without_the_provider_nothing_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    with pytest.raises(ResourceError, match="no CUDA provider") as raised:
        compile_engine(tmp_path / "nowhere", tmp_path / "e.plan", device="cuda")
    assert "onnxruntime-gpu" in raised.value.hint


def test_a_provider_without_its_gpu_is_told(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime falls back to the CPU and says so in its log alone."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(ResourceError, match="finds no GPU"):
        compile_engine(give_voice(tiny_model("llama16")), tmp_path / "e.plan", device="cuda", **GPTQ)
    assert not (tmp_path / "e.plan").exists()


def test_every_block_runs_there(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    session = ort.InferenceSession

    class OnGpu:
        """A session that runs on the CPU and says otherwise."""

        def __init__(self, model: str, options: ort.SessionOptions, providers: list[str]) -> None:
            asked.append(providers)
            self.inner = session(model, options, providers=[CPU])

        def get_providers(self) -> list[str]:
            return asked[-1]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    model = give_voice(tiny_model("llama16"))
    plain = compile_engine(model, tmp_path / "cpu.plan", **GPTQ)
    monkeypatch.setattr(ort, "InferenceSession", OnGpu)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    found = compile_engine(model, tmp_path / "gpu.plan", device="cuda", **GPTQ)
    assert asked
    assert all(providers == [CUDA, CPU] for providers in asked)
    assert found.sha256 == plain.sha256  # the device is no part of the engine


def test_a_device_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device"):
        compile_engine(tmp_path, tmp_path / "e.plan", device="tpu")
