"""rqc verify: every family agrees with PyTorch in every kind of scheme, and what is wrong on purpose fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import safetensors.numpy
from tiny import MODELS, TinyModel, give_voice

from rqc.compiler import manifest as manifests
from rqc.compiler.pipeline import compile_model
from rqc.compiler.recipe import Recipe
from rqc.compiler.verify.engine import ParityReport, verify_engine
from rqc.models import quantized as lazy_quantized
from rqc.models.packing import Quantized
from rqc.passes.accumulation import Int8Accumulation
from rqc.passes.rotate import Rotate
from rqc.runtime.errors import BasisMismatchError, InputError

IDS = np.random.Generator(np.random.PCG64(5)).integers(0, 96, 120).tolist()
KEYS = ["passed", "tokens", "max_abs", "mean_kl", "top1_agreement", "ppl_engine", "ppl_reference", "gates"]


def valid_sites(name: str) -> str:
    return "r2,r3,r4" if name in ("olmo2", "gemma2", "gemma3") else "r1,r2,r3,r4"


def compiled(directory: Path, folder: Path, scheme: str, rotate: str = "r1,r2,r3,r4", **options: Any) -> Path:
    engine = folder / "engine.plan"
    compile_model(directory, engine, recipe=Recipe.from_values({"scheme": scheme, "rotate": rotate, **options}))
    return engine


def verified(engine: Path, directory: Path, **options: Any) -> ParityReport:
    return verify_engine(engine, directory, **{"token_ids": IDS, "tokens": 120, "window": 60, "threads": 1, **options})


def gate(report: ParityReport, name: str) -> bool:
    return next(found.passed for found in report.gates if found.name == name)


@pytest.mark.parametrize("scheme", ["fp32", "w4a16", "w4a8"])
@pytest.mark.parametrize("name", MODELS)
def test_every_family_agrees_with_pytorch(name: str, scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model(name, initializer_range=0.1)
    report = verified(compiled(directory, tmp_path, scheme, valid_sites(name)), directory)
    assert report.passed, report.notes
    if scheme == "w4a8":
        assert report.mean_kl > 1e-6  # against the float model: what the grid costs
    else:
        assert report.mean_kl < 1e-9
        assert report.top1_agreement > 0.99
        assert report.max_abs < 1e-3


@pytest.mark.parametrize("scheme", ["fp16", "w8a16", "w8a8", "w6a6", "w4a4", "w3a16", "w2a16"])
@pytest.mark.parametrize("name", ["llama-tied", "llama-bias"])
def test_every_scheme_agrees_with_pytorch(name: str, scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model(name, initializer_range=0.1)
    report = verified(compiled(directory, tmp_path, scheme), directory)
    assert report.passed, (report.gates, report.notes)


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": -1},
        {"symmetric": False, "clip": "none", "tied": "untie"},
        {"hadamard": "block", "rotation_seed": 7, "embedding_bits": 4},
        {"rotate": "none", "embedding_bits": 32},
    ],
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w6a6"])
def test_every_form_of_storage_is_read_back(
    scheme: str, options: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model("llama-tied", initializer_range=0.1)
    report = verified(compiled(directory, tmp_path, scheme, **options), directory)
    assert report.passed, (report.gates, report.notes)


def test_the_report_has_the_keys_of_the_interface(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama-tied", initializer_range=0.1)
    report = verified(compiled(directory, tmp_path, "w4a8"), directory, tokens=500)
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert list(value) == KEYS
    assert all(list(found) == ["name", "value", "limit", "passed"] for found in value["gates"])
    assert [found["name"] for found in value["gates"]].count("ppl_ratio") == 1
    assert value["tokens"] == 120
    assert "120 tokens compared, 500 asked for" in report.notes[0]


def test_perplexities_are_those_of_the_models(tiny_model: TinyModel, tmp_path: Path) -> None:
    import torch
    import transformers

    directory = tiny_model("qwen2", initializer_range=0.1)
    report = verified(compiled(directory, tmp_path, "fp32"), directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    losses = []
    for start in (0, 60):
        ids = torch.tensor([IDS[start : start + 60]])
        with torch.inference_mode():
            losses.append(float(model(ids, labels=ids).loss))  # the mean over 59 predictions
    assert report.ppl_reference == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert report.ppl_engine == pytest.approx(report.ppl_reference, rel=1e-5)


def test_an_unrotated_stream_cannot_pass_for_the_model(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model("llama-tied", initializer_range=0.1)
    monkeypatch.setattr(Rotate, "_online", lambda self, model, tied: None)  # folds without their online halves
    for scheme, name in (("fp32", "mean_kl"), ("w4a16", "mean_kl"), ("w4a8", "equal_codes")):
        report = verified(compiled(directory, tmp_path, scheme), directory)
        assert not report.passed
        assert not gate(report, name)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_one_flipped_code_fails(
    scheme: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, plain = tiny_model("llama", initializer_range=0.1), lazy_quantized.round_to
    flipped: list[bool] = []

    def flip(chunk: Any, grid: Any) -> Quantized:
        made = plain(chunk, grid)
        if not flipped and grid.bits == 4:
            flipped.append(True)
            made.codes[3, 5] ^= 2
        return made

    monkeypatch.setattr(lazy_quantized, "round_to", flip)
    report = verified(compiled(directory, tmp_path, scheme), directory)
    assert flipped
    assert not report.passed
    assert [found.value for found in report.gates if found.name == "misplaced_codes"] == [1]


def test_a_kernel_that_does_not_round_fails(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model("llama", initializer_range=0.1)
    monkeypatch.setattr(Int8Accumulation, "call", lambda self, model: ir.passes.PassResult(model, modified=False))
    report = verified(compiled(directory, tmp_path, "w4a8"), directory)
    assert not gate(report, "kernel_rounding")
    assert gate(report, "linear_error")
    assert not report.passed


def other_model(directory: Path, folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy of a model with other weights."""
    for file in directory.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_engine_of_another_model_is_refused_by_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama")
    engine = compiled(directory, tmp_path, "w4a8")
    with pytest.raises(InputError, match=r"was compiled from the model [0-9a-f]{12}, .* holds [0-9a-f]{12}"):
        verified(engine, tiny_model("llama", initializer_range=0.1))


@pytest.mark.parametrize("scheme", ["fp16", "w4a8", "w2a16"])
def test_weights_that_changed_unseen_fail(scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama", initializer_range=0.1)
    engine = compiled(directory, tmp_path, scheme)
    rng = np.random.default_rng(0)

    def replace(tensors: dict[str, np.ndarray]) -> None:
        weight = tensors["model.layers.1.mlp.up_proj.weight"]
        weight[1:] = 0.1 * rng.standard_normal(weight[1:].shape)  # the first row tells models apart

    (tmp_path / "other").mkdir()
    report = verified(engine, other_model(directory, tmp_path / "other", replace))
    assert not gate(report, "weights")
    assert not report.passed
    assert "up_proj" in max(report.weights, key=lambda found: found.strain).name


@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
def test_fitted_weights_that_changed_unseen_fail(scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Behind 4-bit activations a weight may be longer than the model's; elsewhere, and in another direction, not."""
    directory = give_voice(tiny_model("llama16", initializer_range=0.1))
    fitted = {"method": "gptq", "calibration_samples": 4, "calibration_length": 48}
    engine = compiled(directory, tmp_path, scheme, "r1,r4", **fitted)

    def longer(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][1:] *= 0.5  # the first row tells models apart

    def other(tensors: dict[str, np.ndarray]) -> None:
        weight = tensors["model.layers.1.mlp.up_proj.weight"]
        weight[1:] = 0.1 * np.random.default_rng(0).standard_normal(weight[1:].shape)

    for change, passes in ((longer, scheme == "w4a4"), (other, False)):
        (folder := tmp_path / change.__name__).mkdir()
        assert gate(verified(engine, other_model(directory, folder, change)), "weights") == passes


def test_a_basis_that_is_not_the_recorded_one_is_refused(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, plain = tiny_model("llama-tied"), manifests.manifest_of

    def reseeded(*arguments: Any) -> dict[str, Any]:
        made = plain(*arguments)
        made["rotation"] = {**made["rotation"], "seed": 1}
        return made

    monkeypatch.setattr(manifests, "manifest_of", reseeded)
    engine = compiled(directory, tmp_path, "fp32", "r1")
    with pytest.raises(BasisMismatchError, match=r"has basis [0-9a-f]{12}, r1 of this model is [0-9a-f]{12}"):
        verified(engine, directory)


def test_weights_of_another_seed_fail(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, plain = tiny_model("llama-tied", initializer_range=0.1), manifests.manifest_of

    def believed(imported: Any, model: Any, recipe: Any, rotation: Any, *rest: Any) -> dict[str, Any]:
        return plain(imported, model, recipe, type(rotation)(rotation.sites, rotation.hadamard, seed=1), *rest)

    monkeypatch.setattr(manifests, "manifest_of", believed)
    report = verified(compiled(directory, tmp_path, "w4a16"), directory)
    assert not gate(report, "weights")
    assert not report.passed


def test_quality_gates_count_only_when_they_are_set(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama", initializer_range=0.1)
    engine = compiled(directory, tmp_path, "w2a16")
    assert verified(engine, directory).passed
    strict = verified(engine, directory, gates={"ppl_ratio": 0.5, "top1_agreement": 0.9})
    assert not strict.passed
    assert not gate(strict, "ppl_ratio")
    assert gate(strict, "top1_agreement")
    assert verified(engine, directory, gates={"ppl_ratio": 50.0, "max_abs": 1.0}).passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": {"ppl_ration": 1.0}}, "unknown gate 'ppl_ration'"),
        ({"gates": {"equal_codes": 0.9}}, "unknown gate 'equal_codes' for scheme fp32"),
        ({"gates": {"mean_kl": 1e-3}}, "looser than the fixed 1e-06"),
        ({"gates": {"ppl_ratio": float("nan")}}, "has the limit nan"),
        ({"tokens": 1}, "1 tokens in windows of 60"),
        ({"token_ids": [4]}, "the text has 1 tokens"),
        ({"token_ids": None}, "this engine has no tokenizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_used_is_refused(
    options: dict[str, Any], message: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model("llama")
    with pytest.raises(InputError, match=message):
        verified(compiled(directory, tmp_path, "fp32"), directory, **options)


@pytest.mark.real
def test_a_real_model_rotated_everywhere_is_the_same_model(smollm2: Path, tmp_path: Path) -> None:
    report = verify_engine(compiled(smollm2, tmp_path, "fp32"), smollm2)
    assert report.tokens == 2048
    assert report.mean_kl <= 1e-7
    assert report.top1_agreement >= 0.999
