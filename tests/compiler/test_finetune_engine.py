"""What is trained is what the engine computes: the loss on held-out records that training tells, and the engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetuning import held_out
from tiny import TinyModel, give_voice

import rqc
from rqc.compiler.finetune.data import Examples
from rqc.runtime.engine import Engine

QUICK: dict[str, Any] = {"rank": 4, "max_steps": 4, "batch_size": 4, "seq_len": 64, "lr": 1e-2, "eval_split": 5}
WIDE: dict[str, Any] = {"head_bits": 32, "embedding_bits": 32, "min_survival": 0.0}
VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "folded": ("llama", {"rotate": "r1,r2,r3,r4"}, "fp32"),
    "dora, tied": ("llama-tied", {"adapter_type": "dora"}, "fp32"),
    "pissa": ("qwen2", {"init": "pissa"}, "fp32"),
    "zero points, packed": ("phi3", {"base": "w4", "adapter_type": "qalora", "target_modules": "qkv_proj"}, "w4a16"),
    "loftq, experts": ("qwen3-moe", {"base": "w2", "init": "loftq", "symmetric": False, "alpha": 8}, "w2a16"),
    "qahira": ("gemma3", {"base": "w3", "adapter_type": "qahira", "repeat": 2, "rotate": "r2,r4"}, "w3a16"),
    "branch, a4": ("granite", {"base": "w4", "activations": 4, "group_size": -1}, "w4a4"),
    "branch, a8": ("llama", {"base": "w4", "activations": 8, "group_size": 16}, "w4a8"),
    "q-bara, a8": ("mixtral", {"base": "w4", "activations": 8, "group_size": 16, "adapter_type": "qbara"}, "w4a8"),
}
CLOSE = {"w4a8": 2e-4}
"""A kernel's codes may be off by one where PyTorch's x falls on the other side of a tie."""


def engine_loss(path: Path, examples: Examples) -> float:
    """Mean over the predicted tokens."""
    total = count = 0.0
    with Engine.load(path, threads=1) as engine:
        for place in range(len(examples)):
            ids, labels = (examples[place][name].numpy() for name in ("input_ids", "labels"))
            logits = engine.logits(ids.tolist())[:-1].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            counted = labels[1:] != -100
            total -= scores[np.arange(len(ids) - 1), ids[1:]][counted].sum()
            count += counted.sum()
    return float(total / count)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_engine_has_the_loss_that_training_tells(
    variant: str, tiny_model: TinyModel, data: Path, tmp_path: Path
) -> None:
    family, options, scheme = VARIANTS[variant]
    model = give_voice(tiny_model(family, initializer_range=0.1))
    report = rqc.finetune(model, data, tmp_path / "adapter", **QUICK, **options)
    rqc.compile(model, tmp_path / "e.plan", adapter=tmp_path / "adapter", scheme=scheme, **WIDE)
    found = engine_loss(tmp_path / "e.plan", held_out(model, data, QUICK["eval_split"]))
    assert found == pytest.approx(report.eval_loss, rel=CLOSE.get(scheme, 1e-6))
