"""`rqc export --format gptq`: what is in the checkpoint is the graph's own weights, in the layout that others read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptq_files import HALF, IDS, SIZES, logits
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from tiny_adapters import save_peft

import rqc
from rqc.compiler.importer import import_model
from rqc.compiler.probe import drift, run_stage
from rqc.runtime.errors import ParityError, RqcError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2", tmp_path_factory.mktemp("gptq") / "model", **SIZES)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama-tied", tmp_path_factory.mktemp("gptq") / "tied", **{**SIZES, "head_dim": 32})


def float_logits(model: Path) -> NDArray[np.float32]:
    return run_stage(import_model(model).model, IDS)


@pytest.mark.parametrize("options", [{}, {"group_size": 32}, {"group_size": -1}, {"rotate": "r1,r2"}], ids=str)
def test_transformers_computes_what_the_grid_says(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    report = rqc.export(model, tmp_path / "out", **{"group_size": 64, **options})
    assert report.linears == 14
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == {"group_size": 64, **options}["group_size"]
    off = drift(float_logits(model), logits(tmp_path / "out"))
    assert 0.01 < off < 0.35  # 4 bits, and nothing worse: a wrong order of nibbles or groups gives more than 1


def test_codes_in_another_order_would_show(model: Path, tmp_path: Path) -> None:
    rqc.export(model, tmp_path / "out", group_size=64, rotate="r1,r2")
    sound = logits(tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.qweight"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, file)
    assert drift(sound, logits(tmp_path / "out")) > 20 * HALF


def test_equal_weights_are_those_of_an_engine_on_the_same_grid(model: Path, tmp_path: Path) -> None:
    rqc.export(model, tmp_path / "out", group_size=32, clip="none")
    options = {"target": "tensorrt-rtx", "portable": True, "dtype": "fp32", "embedding_bits": 32, "head_bits": 32}
    rqc.compile(model, tmp_path / "e.plan", scheme="w4a16", rotate="none", clip="none", **options)
    with rqc.load(tmp_path / "e.plan", backend="onnxruntime") as engine:
        assert drift(engine.logits(IDS.tolist()), logits(tmp_path / "out")) < HALF


def test_r1_unties_the_tables(tied: Path, tmp_path: Path) -> None:
    rqc.export(tied, tmp_path / "plain", group_size=32)
    rqc.export(tied, tmp_path / "turned", group_size=32, rotate="r1")
    kept, untied = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "turned"))
    assert kept["tie_word_embeddings"]
    assert not untied["tie_word_embeddings"]
    for name in ("plain", "turned"):
        assert drift(float_logits(tied), logits(tmp_path / name)) < 0.35


@pytest.mark.parametrize(
    ("options", "said"),
    [({"rotate": "r1,r4"}, "online"), ({"rotate": "auto"}, "online"), ({"group_size": 256}, "whole groups")],
)
def test_what_the_format_cannot_hold_is_refused(
    model: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(RqcError, match=said):
        rqc.export(model, tmp_path / "out", **{"group_size": 64, **options})
    assert not (tmp_path / "out").exists()


def test_families_with_packed_checkpoints_are_refused(tmp_path: Path) -> None:
    model = save_tiny("phi3", tmp_path / "model")
    with pytest.raises(RqcError, match="packs its linears"):
        rqc.export(model, tmp_path / "out", group_size=16)


def test_the_way_out_is_a_group_size_that_every_linear_has(tmp_path: Path) -> None:
    model = save_tiny("llama16", tmp_path / "model")  # 96 and 152 inputs
    with pytest.raises(RqcError, match="groups of 128") as error:
        rqc.export(model, tmp_path / "out")
    assert error.value.hint == "--group-size -1"


def test_an_adapter_is_not_rounded_away_in_silence(model: Path, tmp_path: Path) -> None:
    strong, weak = save_peft(model, tmp_path / "strong"), save_peft(model, tmp_path / "weak", size=1e-6)
    report = rqc.export(model, tmp_path / "out", group_size=64, adapter=strong, min_survival=0.4)
    assert min((report.survival or {}).values()) > 0.4
    with pytest.raises(ParityError, match="rounding leaves less") as error:
        rqc.export(model, tmp_path / "lost", group_size=64, adapter=weak)
    assert "--merge branch" in error.value.hint
    assert not (tmp_path / "lost").exists()
    rqc.export(model, tmp_path / "lost", group_size=64, adapter=weak, min_survival=-99.0)
    with pytest.raises(RqcError, match="cannot switch"):
        rqc.export(model, tmp_path / "switched", group_size=64, adapter={"poet": strong})


def test_scales_that_the_layout_cannot_store_are_refused(tmp_path: Path) -> None:
    model = save_tiny("qwen2", tmp_path / "model", **SIZES)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3] *= 1e9
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RqcError, match=r"layers\.1\.mlp\.up_proj has scales beyond float16"):
        rqc.export(model, tmp_path / "out", group_size=64)
    assert not (tmp_path / "out").exists()
