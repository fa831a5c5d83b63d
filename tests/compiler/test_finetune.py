"""A fine-tune as a whole, on tiny models: what is written is what was trained, whatever the type, base and basis."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from finetuning import held_out, loss, merged
from peft import PeftModel
from tiny import TinyModel, give_voice

import rqc
from rqc.models.torch_model import load_torch_model
from rqc.runtime.errors import SchemeError

QUICK: dict[str, Any] = {"rank": 4, "max_steps": 3, "batch_size": 4, "seq_len": 64, "lr": 1e-2, "eval_split": 6}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "plain": {"rotate": "none"},
    "all sites": {"rotate": "r1,r2,r3,r4", "rotation_seed": 3},
    "block": {"hadamard": "block"},
    "dora": {"adapter_type": "dora"},
    "rslora": {"rslora": True},
    "some modules": {"target_modules": "q_proj,down_proj"},
    "lora-plus": {"optimizer": "lora-plus"},
    "lora-fa": {"optimizer": "lora-fa", "lr": 1e-3},
    "qalora lora-fa": {"optimizer": "lora-fa", "lr": 1e-3, "adapter_type": "qalora", "dropout": 0.1},
    "lora-rite": {"optimizer": "lora-rite", "weight_decay": 0.1},
    "dora lora-rite": {"optimizer": "lora-rite", "adapter_type": "dora"},
    "qalora lora-rite": {"optimizer": "lora-rite", "adapter_type": "qalora", "base": "w4"},
    "qbara lora-rite": {"optimizer": "lora-rite", "adapter_type": "qbara", "rslora": True},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "mica": {"init": "mica"},
    "w4": {"base": "w4"},
    "w4 asymmetric": {"base": "w4", "symmetric": False, "group_size": 16, "clip": "none"},
    "w2": {"base": "w2"},
    "w3 dora": {"base": "w3", "adapter_type": "dora"},
    "nf4": {"base": "nf4"},
    "loftq": {"base": "w2", "init": "loftq", "alpha": 8},
    "loftq nf4": {"base": "nf4", "init": "loftq"},
    "eora": {"base": "w2", "init": "eora", "alpha": 8},
    "eora nf4": {"base": "nf4", "init": "eora", "rotate": "r1,r2,r4"},
    "qalora": {"adapter_type": "qalora", "base": "w4", "group_size": 16},
    "qahira": {"adapter_type": "qahira", "base": "w4", "group_size": 16},
    "qahira shared": {"adapter_type": "qahira", "base": "w4", "group_size": 16, "pool": 32, "repeat": 4},
    "qbara": {"adapter_type": "qbara"},
    "w4a8": {"base": "w4", "activations": 8},
    "a4": {"activations": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_adapter_that_is_written_is_the_one_that_was_trained(
    variant: str, model: Path, data: Path, tmp_path: Path
) -> None:
    report = rqc.finetune(model, data, tmp_path / "adapter", **{**QUICK, **VARIANTS[variant]})
    examples = held_out(model, data, QUICK["eval_split"])
    expected = loss(merged(model, tmp_path / "adapter").model, examples)
    assert report.eval_loss == pytest.approx(expected, rel=1e-5)
    assert report.steps == 3
    log = json.loads((tmp_path / "adapter" / "training.json").read_text())["log"]
    assert [entry["step"] for entry in log] == [1, 2, 3]
    assert log[-1]["eval_loss"] == report.eval_loss


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "qwen3", "phi3", "gemma", "granite", "mixtral", "qwen3-moe"])
def test_families(family: str, tiny_model: TinyModel, data: Path, tmp_path: Path) -> None:
    model = give_voice(tiny_model(family))
    report = rqc.finetune(model, data, tmp_path / "adapter", **QUICK)
    examples = held_out(model, data, QUICK["eval_split"])
    assert report.eval_loss == pytest.approx(loss(merged(model, tmp_path / "adapter").model, examples), rel=1e-5)


@pytest.mark.parametrize("variant", ["lora", "all sites", "pissa", "rslora"])
def test_the_plain_export_opens_with_peft_on_the_untouched_model(
    variant: str, tiny_model: TinyModel, data: Path, tmp_path: Path
) -> None:
    model = give_voice(tiny_model("llama-tied"))
    options = {**QUICK, **VARIANTS[variant], "export_plain": tmp_path / "plain"}
    report = rqc.finetune(model, data, tmp_path / "adapter", **options)
    opened = PeftModel.from_pretrained(load_torch_model(model), str(tmp_path / "plain")).eval()
    found = loss(opened, held_out(model, data, QUICK["eval_split"]))
    assert report.eval_loss == pytest.approx(found, rel=1e-5)
    assert report.plain == str(tmp_path / "plain")


@pytest.mark.parametrize("options", [{"init": "eora"}, {"init": "loftq", "loftq_iterations": 1}], ids=["eora", "loftq"])
def test_what_repairs_its_base_is_not_added_to_weights_that_are_whole(
    options: dict[str, Any], model: Path, data: Path, tmp_path: Path
) -> None:
    """Adapters that have learned nothing: exported, during the run or after it, they change nothing."""
    path, plain = tmp_path / "adapter", tmp_path / "plain"
    still = {**QUICK, **options, "base": "w2", "lr": 1e-12, "export_plain": plain}
    examples = held_out(model, data, QUICK["eval_split"])
    untouched = loss(load_torch_model(model), examples)
    for again in ({}, {"resume": True}):
        rqc.finetune(model, data, path, **still, **again)
        opened = PeftModel.from_pretrained(load_torch_model(model), str(plain)).eval()
        assert loss(opened, examples) == pytest.approx(untouched, rel=1e-6)
        shutil.rmtree(plain)
    assert loss(merged(model, path).model, examples) != pytest.approx(untouched, rel=1e-3)
    other = tmp_path / "other"
    rqc.finetune(model, data, other, **{**still, "export_plain": None, "seed": 1})
    for adapters, extra in (([path], {"merge": "fold"}), ([path, other], {}), ([f"a={path}"], {})):
        with pytest.raises(SchemeError, match="repairs the rounding"):
            rqc.compile(model, tmp_path / "e.plan", adapter=adapters, **extra)
