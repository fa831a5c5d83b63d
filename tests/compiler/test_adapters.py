"""Adapters on their way into an engine: the function is peft's, frames and grids fit or are refused, nothing is rounded
away in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft_adapters import mean_kl, peft_logits, save_peft

from rqc.compiler.api import compile_engine
from rqc.compiler.importer import import_model
from rqc.models.adapter import AdapterBasis
from rqc.models.algebra import dimensions
from rqc.models.delta import Delta
from rqc.models.grid import Grid
from rqc.models.rotation import Rotation
from rqc.runtime.engine import Engine

TinyModel = Callable[..., Path]
IDS = np.random.default_rng(5).integers(0, 96, 40)
FAMILIES = ("llama", "llama-bias", "llama-tied", "smollm3", "mistral", "qwen2", "qwen3", "phi3", "granite", "gemma")
POST_NORM = ("olmo2", "gemma2", "gemma3")


class Lines:
    """Progress as a list."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, label: str, done: int, total: int) -> None:
        pass


def engine_logits(path: Path) -> np.ndarray:
    with Engine.load(path, threads=1) as engine:
        return engine.logits(IDS.tolist())


def linears(directory: Path) -> dict[str, tuple[int, int]]:
    """Shapes of all linears of the blocks, by the graph's names."""
    description = import_model(directory).description
    return {claim.weight: description.shape(claim) for claim in description.claims if claim.quantized}


def random_deltas(directory: Path, rank: int = 4, size: float = 0.05, pool: int = 1) -> dict[str, Delta]:
    """Low-rank parts for every linear; A constant in blocks of `pool` inputs."""
    draw = np.random.default_rng(7)
    deltas = {}
    for name, (n, k) in linears(directory).items():
        a = np.repeat(draw.normal(size=(rank, -(-k // pool))), pool, axis=1)[:, :k] / np.sqrt(k)
        deltas[name] = Delta(a, size * draw.normal(size=(n, rank)), 2.0)
    return deltas


def basis_of(directory: Path, sites: str, **fields: Any) -> AdapterBasis:
    imported = import_model(directory)
    rotation = Rotation.parse(sites)
    values: dict[str, Any] = {
        "rotation": rotation,
        "basis": rotation.basis(dimensions(imported.description)) if rotation.sites else None,
        "base": imported.checkpoint.fingerprint(),
        "model_type": imported.description.architecture.model_type,
        "grid": None,
        "base_kind": "float",
        "activations": 16,
        "adapter_type": "lora",
        "residual": False,
    }
    return AdapterBasis(**{**values, **fields})


W4 = {"grid": Grid(4, 16, False, "mse"), "base_kind": "w4"}


@pytest.mark.parametrize("name", [*FAMILIES, *POST_NORM])
def test_a_folded_adapter_is_what_peft_computes_in_every_family(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model(name)
    adapter = save_peft(directory, tmp_path / "adapter", use_rslora=True)
    sites = "r2,r3,r4" if name in POST_NORM else "r1,r2,r3,r4"
    report = compile_engine(directory, tmp_path / "e.plan", adapter=adapter, scheme="fp32", rotate=sites)
    expected = peft_logits(directory, adapter, IDS)
    assert mean_kl(expected, engine_logits(tmp_path / "e.plan")) <= 1e-7
    assert report.survival is not None
    assert min(report.survival.values()) > 0.999
    compile_engine(directory, tmp_path / "plain.plan", scheme="fp32", rotate="none")
    assert mean_kl(expected, engine_logits(tmp_path / "plain.plan")) > 1e-4  # the adapter does change the function


@pytest.mark.parametrize("sites", ["none", "r1", "r2,r4", "r1,r4", "r1,r2,r3,r4"])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["llama-tied", "phi3"])
def test_every_frame_takes_every_kind(
    name: str, config: dict[str, Any], sites: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model(name)
    adapter = save_peft(directory, tmp_path / "adapter", **config)
    compile_engine(directory, tmp_path / "e.plan", adapter=adapter, scheme="fp32", rotate=sites)
    assert mean_kl(peft_logits(directory, adapter, IDS), engine_logits(tmp_path / "e.plan")) <= 1e-7
