"""`rqc export ENGINE`: the checkpoint has the engine's own codes, and transformers computes with it what the engine
does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptq_files import HALF, IDS, SIZES, logits, read
from tiny import add_tokenizer, save_tiny
from tiny_adapters import save_peft

import rqc
from rqc.compiler import manifest
from rqc.compiler.cli import main
from rqc.compiler.export.layout import Tensor
from rqc.compiler.export.parameters import check_parameters
from rqc.compiler.probe import drift
from rqc.compiler.verify.stored import StoredGraph
from rqc.models.packing import Quantized
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import EngineFormatError, RqcError, UnsupportedModelError

SHORT = {"calibration_samples": 2, "calibration_length": 32}
PORTABLE = {"target": "tensorrt-rtx", "portable": True}
Models = dict[str, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    names = {"qwen2": {}, "llama-tied": {"head_dim": 32}, "gemma": {"head_dim": 32}}
    made = {name: save_tiny(name, root / name, **{**SIZES, **more}) for name, more in names.items()}
    return {name: add_tokenizer(path) for name, path in made.items()}


def engine_of(model: Path, path: Path, **options: Any) -> Path:
    rqc.compile(model, path, **{"scheme": "w4a16", "rotate": "none", **options})
    return path


def linears_of(engine: Path) -> dict[str, Quantized]:
    """Codes and scales of every linear of the blocks, as the engine's nodes read them."""
    found = {}
    with EngineFile.open(engine) as file:
        stored = StoredGraph.read(file)
        rows = {"q_proj": 128, "k_proj": 64, "v_proj": 64, "gate_proj": 192, "up_proj": 192}
        for label, linear in stored.linears.items():
            first, whole = 0, stored.quantized(linear, 4) if "layers" in label else None
            for name in linear.names if whole is not None else ():
                size = rows.get(name.split(".")[-2], 128) if len(linear.names) > 1 else whole.shape[0]
                found[name] = whole.rows(slice(first, first + size))
                first += size
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2", {"group_size": -1, "rotate": "r1,r2"}),
        ("qwen2", {**PORTABLE, "rotate": "r2", "dtype": "fp32", "embedding_bits": 32}),
        ("llama-tied", {"rotate": "r2"}),
        ("llama-tied", {"rotate": "r1,r2"}),
        ("llama-tied", {"rotate": "r1,r2", "tied": "untie", "method": "gptq", **SHORT}),
        ("gemma", {"rotate": "r1"}),
    ],
    ids=str,
)
def test_the_checkpoint_is_the_engine(models: Models, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    engine = engine_of(models[name], tmp_path / "e.plan", **options)
    report = rqc.export(engine, tmp_path / "out")
    back, codes = read(tmp_path / "out"), linears_of(engine)
    assert len(codes) == report.linears == 14
    for weight, quantized in codes.items():
        half = Quantized(quantized.codes, quantized.scales.astype(np.float16).astype(np.float32), *_rest(quantized))
        assert np.array_equal(back[weight].numpy(), half.dequantize()), weight
    assert report.scale_error < 2**-11
    with rqc.load(engine, backend="onnxruntime") as loaded:
        assert drift(loaded.logits(IDS.tolist()), logits(tmp_path / "out")) < HALF
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (models[name] / "tokenizer.json").read_bytes()


def _rest(quantized: Quantized) -> tuple[Any, int, int, int]:
    return quantized.zero_points, quantized.bits, quantized.storage_bits, quantized.block_size


def test_scales_of_an_engine_in_half_precision_are_kept_to_the_bit(models: Models, tmp_path: Path) -> None:
    engine = engine_of(models["llama-tied"], tmp_path / "e.plan", rotate="r1,r2", **PORTABLE)
    report = rqc.export(engine, tmp_path / "out")
    assert report.scale_error == 0
    assert not any("negative" in note for note in report.notes)
    assert any("folded into both" in note for note in report.notes)
    back = read(tmp_path / "out")
    for weight, quantized in linears_of(engine).items():
        assert np.array_equal(back[weight].numpy(), quantized.dequantize()), weight
    with rqc.load(engine, backend="onnxruntime") as loaded:
        assert drift(loaded.logits(IDS.tolist()), logits(tmp_path / "out")) < 3 * HALF  # its activations are half too


def test_what_is_lost_is_said(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = engine_of(models["qwen2"], tmp_path / "e.plan", scheme="w4a8", kv_cache="int8", **SHORT)
    assert main(["export", str(engine), "-o", str(tmp_path / "out"), "--json"]) == 0
    notes = " ".join(json.loads(capsys.readouterr().out)["notes"])
    for said in ("activations are floats", "int8 cache", "in the engine of 8 bits", "% of the scales are negative"):
        assert said in notes


@pytest.mark.parametrize(
    ("options", "said", "way"),
    [
        ({"scheme": "w8a16"}, "has 8 bits", "with --scheme w4a16;"),
        ({"bits_budget": 4.5, **SHORT}, "has 8 bits", "without --bits-budget"),
        (
            {"symmetric": False, "rotate": "r1,r2,r4"},
            "zero points; r4 are computed",
            "--symmetric, with --rotate r1,r2",
        ),
        ({"compensate": "eora", **SHORT}, "branches make up", "without --compensate"),
        ({"group_size": 128}, r"down_proj.weight \[128, 192\] in groups of 128", "with --group-size 64"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    models: Models, tmp_path: Path, options: dict[str, Any], said: str, way: str
) -> None:
    engine = engine_of(models["qwen2"], tmp_path / "e.plan", **options)
    with pytest.raises(RqcError, match=said) as error:
        rqc.export(engine, tmp_path / "out")
    assert way in error.value.hint
    assert "rqc export MODEL_DIR" in error.value.hint
    assert not (tmp_path / "out").exists()


def test_adapters_are_in_the_weights_or_refused(models: Models, tmp_path: Path) -> None:
    adapter = save_peft(models["qwen2"], tmp_path / "adapter")
    folded = engine_of(models["qwen2"], tmp_path / "e.plan", adapter=adapter, min_survival=0.0)
    rqc.export(folded, tmp_path / "out")
    with rqc.load(folded) as loaded:
        assert drift(loaded.logits(IDS.tolist()), logits(tmp_path / "out")) < HALF
    beside = engine_of(models["qwen2"], tmp_path / "e.plan", adapter=adapter, merge="branch")
    with pytest.raises(RqcError, match="merged by branch"):
        rqc.export(beside, tmp_path / "refused")
    named = engine_of(models["qwen2"], tmp_path / "e.plan", adapter={"poet": adapter})
    with pytest.raises(RqcError) as error:
        rqc.export(named, tmp_path / "refused")
    assert "without a name" in error.value.hint


def test_an_engine_has_no_options(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "OTHER_FILES", ())
    engine = engine_of(models["qwen2"], tmp_path / "e.plan")
    with pytest.raises(RqcError, match=r"--group-size, --clip with the engine .*e\.plan"):
        rqc.export(engine, tmp_path / "out", group_size=64, clip="none")
    with pytest.raises(RqcError, match=r"holds no config\.json"):
        rqc.export(engine, tmp_path / "out")
    with pytest.raises(RqcError, match="unknown option 'group'"):
        rqc.export(engine, tmp_path / "out", group=64)


def test_families_with_packed_checkpoints_are_refused(tmp_path: Path) -> None:
    engine = engine_of(save_tiny("phi3", tmp_path / "model"), tmp_path / "e.plan", group_size=16)
    with pytest.raises(UnsupportedModelError, match="packs its linears"):
        rqc.export(engine, tmp_path / "out")


def test_a_parameter_too_few_or_of_another_shape_is_found(models: Models) -> None:
    config = json.loads((models["qwen2"] / "config.json").read_text())
    with pytest.raises(EngineFormatError, match=r"lm_head\.weight is missing in the engine, \[96, 128\] in its config"):
        check_parameters(config, [])
    head = Tensor("lm_head.weight", (96, 127), np.float16, lambda: np.empty(0))
    with pytest.raises(EngineFormatError, match=r"lm_head\.weight is \[96, 127\]"):
        check_parameters(config, [head])


def test_codes_are_fitted_to_text_as_a_compile_fits_them(models: Models, tmp_path: Path) -> None:
    options = {"group_size": 64, "method": "gptq", **SHORT}
    floats = {"dtype": "fp32", "embedding_bits": 32, "head_bits": 32}  # positive scales, as in an export of a model
    engine = engine_of(models["qwen2"], tmp_path / "e.plan", **options, **floats, **PORTABLE)
    rqc.export(engine, tmp_path / "engine")
    rqc.export(models["qwen2"], tmp_path / "fitted", **options)
    rqc.export(models["qwen2"], tmp_path / "nearest", group_size=64)
    of_engine, fitted, nearest = (read(tmp_path / name) for name in ("engine", "fitted", "nearest"))
    names = [name for name in of_engine if name.endswith("proj.weight")]
    assert np.mean([(of_engine[name] == fitted[name]).float().mean() for name in names]) > 0.99
    assert np.mean([(of_engine[name] == nearest[name]).float().mean() for name in names]) < 0.95
