"""Engines with branches of their own: what is compiled is what PyTorch computes with the same codes and branches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TinyModel, give_voice

from rqc.compiler.api import compile_engine
from rqc.compiler.verify import verify_engine

QUICK: dict[str, Any] = {"calibration_samples": 4, "calibration_length": 48, "clip": "none"}


def compiled(model: Path, target: Path, **options: Any) -> Path:
    compile_engine(give_voice(model), target, **{**QUICK, **options})
    return target


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "w3a16", "rotate": "none", "compensate": "eora", "compensate_rank": 8},
        {"scheme": "w4a16", "rotate": "r1,r4", "compensate": "eora", "compensate_budget": 3.0},
        {"scheme": "w4a8", "rotate": "r1,r4", "compensate": "eora", "compensate_rank": 8},
        {"scheme": "w4a4", "rotate": "r1,r4", "compensate": "eora", "compensate_rank": 8, "method": "gptq"},
        {"scheme": "w2a16", "rotate": "none", "compensate": "loftq", "compensate_rank": 8},
        {"scheme": "w4a16", "rotate": "none", "sparsity": "2:4", "compensate": "eora", "compensate_rank": 8},
        {"scheme": "w4a16", "rotate": "none", "sparsity": "2:4", "prune": "magnitude", "symmetric": False},
    ],
    ids=["w3", "budget", "w4a8", "w4a4", "loftq", "sparse", "sparse alone"],
)
@pytest.mark.parametrize("name", ["llama16"])
def test_the_engine_is_its_own_fake_quantization(
    name: str, options: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    engine = compiled(tiny_model(name), tmp_path / "e.plan", **options)
    ids = np.random.default_rng(3).integers(3, 96, 96).tolist()
    report = verify_engine(engine, tiny_model(name), token_ids=ids, tokens=96, window=48)
    assert report.passed, [(gate.name, gate.value, gate.limit) for gate in report.gates]
