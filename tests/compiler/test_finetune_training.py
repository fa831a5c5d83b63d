"""How a fine-tune trains: the same whatever its memory and its processes, on the codes that are deployed."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetuning import held_out, loss
from safetensors.numpy import load_file
from tiny import TinyModel

import rqc
from rqc.compiler.cli import main
from rqc.compiler.finetune.optimizers import LoraFA
from rqc.compiler.finetune.settings import Settings
from rqc.compiler.finetune.stage import build_stage
from rqc.compiler.finetune.train import AdapterTrainer, LengthBuckets
from rqc.compiler.instruments import Silent
from rqc.compiler.text import calibration_text, read_tokenizer
from rqc.models.adapter_frames import frame_folds
from rqc.models.checkpoint import Checkpoint
from rqc.models.grid_linear import GridLinear
from rqc.models.merges import AddDelta
from rqc.models.quantized import LazyQuantized
from rqc.models.torch_model import load_torch_model
from rqc.models.weights import Weight
from rqc.runtime.errors import InputError

QUICK: dict[str, Any] = {"rank": 4, "max_steps": 4, "batch_size": 4, "seq_len": 64, "lr": 1e-2, "eval_split": 5}


def distance(one: Path, two: Path) -> float:
    """The largest difference of two adapters' entries."""
    left, right = (load_file(path / "adapter_model.safetensors") for path in (one, two))
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def flagged(options: dict[str, Any]) -> list[str]:
    """Options as the command line has them."""
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize("options", [{}, {"base": "w4", "activations": 8, "rotate": "r1,r2,r3,r4"}], ids=str)
def test_gradient_checkpointing_changes_nothing(
    options: dict[str, Any], model: Path, data: Path, tmp_path: Path
) -> None:
    for name in ("kept", "computed"):
        checkpointing = name == "computed"
        rqc.finetune(model, data, tmp_path / name, **QUICK, **options, gradient_checkpointing=checkpointing)
    assert distance(tmp_path / "kept", tmp_path / "computed") <= 1e-7


@pytest.mark.parametrize(("ratio", "first"), [(0.01, 1e-2), (0.5, 0.0)])
def test_warm_up_takes_whole_steps(ratio: float, first: float, model: Path, data: Path, tmp_path: Path) -> None:
    rqc.finetune(model, data, tmp_path / "adapter", **{**QUICK, "max_steps": 2}, warmup_ratio=ratio)
    log = json.loads((tmp_path / "adapter" / "training.json").read_text())["log"]
    assert log[0]["lr"] == first


def test_accumulated_batches_count_by_their_tokens(model: Path, data: Path, tmp_path: Path) -> None:
    rqc.finetune(model, data, tmp_path / "whole", **QUICK)
    rqc.finetune(model, data, tmp_path / "halves", **{**QUICK, "batch_size": 2}, grad_accum=2)
    assert distance(tmp_path / "whole", tmp_path / "halves") <= 1e-6


def test_two_processes_train_what_one_does(model: Path, data: Path, tmp_path: Path) -> None:
    one = rqc.finetune(model, data, tmp_path / "one", **QUICK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    call = [sys.executable, "-c", "import sys; from rqc.compiler.cli import main; sys.exit(main())", "finetune", model]
    flags = flagged({**QUICK, "batch_size": 2})
    command = [*launch, "--no-python", *call, "--data", data, "-o", tmp_path / "two", *flags, "--json"]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    two = json.loads(ended.stdout)  # of one process alone
    assert ended.stderr.count("evaluation: 5 examples") == 1
    assert distance(tmp_path / "one", tmp_path / "two") <= 1e-6
    assert two["eval_loss"] == pytest.approx(one.eval_loss, rel=1e-6)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


def test_a_seed_is_a_run(model: Path, data: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        rqc.finetune(model, data, tmp_path / name, **QUICK, dropout=0.2, seed=seed)
    assert distance(tmp_path / "one", tmp_path / "same") == 0
    assert distance(tmp_path / "one", tmp_path / "other") > 1e-3
    log = json.loads((tmp_path / "one" / "training.json").read_text())["log"]
    before = loss(load_torch_model(model), held_out(model, data, 5))
    assert log[-1]["eval_loss"] < before - 0.1  # it learns


def test_epochs_and_evaluations_are_counted(model: Path, data: Path, tmp_path: Path) -> None:
    report = rqc.finetune(model, data, tmp_path / "adapter", **{**QUICK, "max_steps": 0, "epochs": 2, "batch_size": 6})
    log = json.loads((tmp_path / "adapter" / "training.json").read_text())["log"]
    assert report.steps == 2 * 4  # 19 records in batches of 6
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [4, 8]
    assert log[0]["lr"] == pytest.approx(1e-2)
    assert all(left["lr"] > right["lr"] for left, right in pairwise(entry for entry in log if "lr" in entry))


def test_every_epoch_has_an_order_of_its_own(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    step = AdapterTrainer.training_step

    def watched(self: AdapterTrainer, net: Any, inputs: Any, *arguments: Any) -> torch.Tensor:
        seen.append(inputs["input_ids"].numpy().tobytes())
        return step(self, net, inputs, *arguments)

    monkeypatch.setattr(AdapterTrainer, "training_step", watched)
    options = {**QUICK, "max_steps": 0, "epochs": 2, "batch_size": 1, "lr": 1e-4}
    rqc.finetune(model, data, tmp_path / "adapter", **options)
    first, second = seen[:19], seen[19:]
    assert sorted(first) == sorted(second)
    assert first != second


def test_half_precision_trains_nearly_the_same(model: Path, data: Path, tmp_path: Path) -> None:
    reports = [rqc.finetune(model, data, tmp_path / dtype, **QUICK, dtype=dtype) for dtype in ("fp32", "bf16")]
    assert reports[1].eval_loss == pytest.approx(reports[0].eval_loss, rel=0.02)
    assert reports[1].float_bytes * 2 == reports[0].float_bytes
    saved = load_file(tmp_path / "bf16" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("family", ["llama16", "phi3", "gemma"])
@pytest.mark.parametrize(
    "options", [{"base": "w4"}, {"base": "w2", "symmetric": False}, {"base": "w2", "init": "loftq"}]
)
def test_the_base_holds_the_codes_that_a_compile_makes(
    family: str, options: dict[str, Any], tiny_model: TinyModel
) -> None:
    directory = tiny_model(family)
    settings = Settings.from_values({"rank": 4, "rotate": "r1,r2,r4", **options})
    stage = build_stage(directory, settings, Silent())
    description, checkpoint = stage.reference.description, Checkpoint.open(directory)
    assert settings.grid is not None
    for target in stage.targets:
        linear = next(iter(target.parts.values())).linear
        assert isinstance(linear, GridLinear)
        held = linear.quantized()
        for name, part in target.parts.items():
            start = part.rows.start if len(target.parts) > 1 else 0
            shape = tuple(part.weight.shape)
            stored = f"{target.path}.weight"
            weight = Weight(checkpoint, stored, shape, start, tuple(frame_folds(name, description, settings.rotation)))
            if (residual := stage.residuals.get(name)) is not None:
                weight = weight.folded(AddDelta(residual, -1.0))
            wanted = LazyQuantized((weight,), settings.grid).get()
            np.testing.assert_array_equal(held.codes[part.rows], wanted.codes)
            np.testing.assert_array_equal(held.scales[part.rows], wanted.scales)
    assert bool(stage.residuals) == ("init" in options)
    assert stage.base_bytes < stage.float_bytes / 4


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian", "mica", "default"])
def test_no_start_changes_the_function(init: str, model: Path, data: Path) -> None:
    examples = held_out(model, data, 5)
    stage = build_stage(model, Settings.from_values({"rank": 4, "init": init}), Silent())
    assert loss(stage.model.eval(), examples) == pytest.approx(loss(load_torch_model(model), examples), rel=1e-5)


def test_loftq_starts_closer_to_the_model(model: Path) -> None:
    ids = torch.arange(40)[None] % 96
    with torch.inference_mode():
        wanted = load_torch_model(model)(input_ids=ids).logits
        errors = []
        for options in ({"init": "loftq", "alpha": 8}, {"init": "default"}):
            settings = Settings.from_values({"base": "w2", "rank": 8, **options})
            found = build_stage(model, settings, Silent()).model.eval()(input_ids=ids).logits
            errors.append(float((found - wanted).norm()))
    assert errors[0] < 0.9 * errors[1]


def test_eora_starts_closer_on_its_text(model: Path) -> None:
    """Than LoftQ of one turn, which has the same codes and knows no text; the scale of the adapter changes nothing."""
    tokenizer = read_tokenizer(model)
    assert tokenizer is not None
    ids = torch.tensor([tokenizer.encode(calibration_text(), add_special_tokens=False).ids[:200]])
    with torch.inference_mode():
        wanted = load_torch_model(model)(input_ids=ids).logits
        errors = []
        for options in (
            {"init": "eora", "alpha": 8},
            {"init": "eora", "alpha": 32},
            {"init": "loftq", "loftq_iterations": 1},
            {"init": "default"},
        ):
            settings = Settings.from_values({"base": "w2", "rank": 8, **options})
            found = build_stage(model, settings, Silent()).model.eval()(input_ids=ids).logits
            errors.append(float((found - wanted).norm()))
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    assert errors[0] < 0.97 * errors[2] < 0.97 * errors[3]


def test_lora_fa_moves_b_as_close_to_the_full_gradient_as_its_fixed_a_allows(model: Path) -> None:
    settings = Settings.from_values({"rank": 4, "alpha": 12, "optimizer": "lora-fa"})
    stage = build_stage(model, settings, Silent())
    layer: Any = stage.reference.model.get_submodule(stage.targets[0].path)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.requires_grad, b.requires_grad) == (False, True)
    full = torch.randn(b.shape[0], a.shape[1], dtype=torch.float64)
    b.grad = (3 * full @ a.T.double()).float()  # c = 12 / 4
    optimizer = LoraFA(stage.model, lr=0.0)
    optimizer.step()
    found = 3 * b.grad.double() @ a.double()
    best = full @ torch.linalg.pinv(a.double()) @ a.double()
    assert float((found - best).norm() / best.norm()) < 1e-5


def test_batches_are_of_like_lengths_in_an_order_of_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 500, 1003).tolist()
    buckets = LengthBuckets(lengths, 8, seed=3)
    first, again = list(buckets), list(buckets)
    buckets.epoch = 1
    second = list(buckets)
    assert first == again != second
    assert sorted(first) == sorted(second) == list(range(1003))
    assert first != list(LengthBuckets(lengths, 8, seed=4))
    batches = [[lengths[place] for place in first[start : start + 8]] for start in range(0, 1003, 8)]
    padded = sum(len(batch) * max(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)  # 1.8 in random order
    tops = [max(batch) for batch in batches]
    assert abs(float(np.corrcoef(tops[:-1], tops[1:])[0, 1])) < 0.3  # and no run from long to short


def test_the_command_line(model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = flagged({"rank": 2, "max_steps": 2, "batch_size": 2, "seq_len": 64, "target_modules": "q_proj,v_proj"})
    arguments = [str(model), "--data", str(data), "-o", str(tmp_path / "adapter"), *flags]
    assert main(["finetune", *arguments, "--base", "w4", "--json", "--seq-len", "1000"]) == 0
    out, err = capfd.readouterr()
    value = json.loads(out)
    assert set(value) >= {
        *(
            "adapter",
            "steps",
            "seconds",
            "train_loss",
            "eval_loss",
            "trainable_parameters",
            "base_bytes",
            "float_bytes",
        ),
        *("peak_rss_bytes", "dropped"),
    }
    assert (value["steps"], value["eval_loss"], value["trainable_parameters"]) == (2, None, 2 * 2 * (96 + 96 + 96 + 32))
    assert "records are cut after 256 tokens: the model's context" in err
    assert "training: step 2 of 2, loss" in err
    assert "\r" not in err  # no animation
    assert main(["finetune", *arguments, "--init", "pisa"]) == 2
    out, err = capfd.readouterr()
    assert err.splitlines()[-2].startswith("error: init 'pisa' is not available")
    assert main(["finetune", *arguments[:-2], "--target-modules", "q_porj", "--json"]) == 2
    out, err = capfd.readouterr()
    assert json.loads(out)["error"]["type"] == "InputError"


def test_the_kind_of_no_rotation_is_refused() -> None:
    with pytest.raises(InputError, match="--hadamard block with --rotate none"):
        Settings.from_values({"rotate": "none", "hadamard": "block"})
