"""Grids of activations by option: what is searched is never worse, what is written is what verify reproduces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tiny import TinyModel
from tiny_adapters import Lines, save_peft, talking

from rqc.compiler.api import compile_engine
from rqc.compiler.calibration.clips import RATIOS, best_ratios, output_errors, searched_clips, sites_of
from rqc.compiler.importer import import_model
from rqc.compiler.recipe import Recipe
from rqc.compiler.verify.engine import ParityReport, verify_engine
from rqc.models.rotation import Rotation
from rqc.models.token_grid import TokenGrid
from rqc.passes import activations
from rqc.passes.activations import QuantizeActivations
from rqc.passes.base import CLIP, linears
from rqc.passes.clips import RecordClips
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import CheckpointError, EngineFormatError, InputError, ResourceError, RqcError, SchemeError
from rqc.runtime.inspection import inspect_engine

IDS = np.random.default_rng(5).integers(3, 96, 120).tolist()
NONE = Rotation.parse("none")


def directory_of(tiny_model: TinyModel, folder: Path, name: str = "llama16") -> Path:
    return talking(tiny_model(name, initializer_range=0.1), folder / "model")


def checked(engine: Path, directory: Path) -> ParityReport:
    return verify_engine(engine, directory, token_ids=IDS, tokens=120, window=60, threads=1)


@pytest.mark.parametrize("outputs", [20, 200])
@pytest.mark.parametrize("symmetric", [True, False])
def test_errors_are_those_of_what_the_linears_write(symmetric: bool, outputs: int) -> None:
    draw = np.random.default_rng(outputs)
    x, w = draw.standard_normal((60, 48)).astype(np.float32), draw.standard_normal((outputs, 48)).astype(np.float32)
    grid = TokenGrid(4, symmetric)
    errors = output_errors(x, [w[:7], w[7:]], grid)
    for ratio, error in zip(RATIOS, errors, strict=True):
        off = (replace(grid, clip=ratio).round(x) - x).astype(np.float64)
        assert error == pytest.approx(np.trace(w @ (off.T @ off) @ w.T), rel=1e-4)


@pytest.mark.parametrize("name", ["llama16", "phi3", "qwen3-moe"])
def test_every_tensor_has_one_ratio_that_is_no_worse_than_none(name: str, tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model(name))
    sites = sites_of(imported.model, imported.description)
    ratios = best_ratios(imported.model, sites, np.asarray([IDS[:60], IDS[60:]]), TokenGrid(4))
    assert ratios.keys() == sites.keys()
    assert set(ratios.values()) <= set(RATIOS)
    assert min(ratios.values()) < 1
    read = {weight for weights in sites.values() for weight in weights}
    assert read == {claim.weight for claim in imported.description.claims if claim.quantized}
    assert any(len(weights) > 1 for weights in sites.values()) or name == "phi3"


def test_ratios_are_marked_once(tiny_model: TinyModel, tmp_path: Path) -> None:
    imported = import_model(directory_of(tiny_model, tmp_path))
    recipe, lines = Recipe.from_values({"scheme": "w4a4", "activation_clip": "auto"}), Lines()
    found = searched_clips(recipe, imported, NONE, None, lines)
    assert "activation clip auto: 8 tensors" in lines.lines[-1]
    assert (
        found.clips["model.layers.0.self_attn.q_proj.weight"] == found.clips["model.layers.0.self_attn.v_proj.weight"]
    )
    step = RecordClips(found.clips)
    assert step(imported.model).modified
    assert not step(imported.model).modified
    marks = {name: node.metadata_props.get(CLIP) for name, node in linears(imported.model)}
    assert marks == {name: f"{found.clips[name]:g}" if name in found.clips else None for name in marks}
    plain = Recipe.from_values({"scheme": "w4a4", "activation_clip": 0.9})
    assert searched_clips(plain, imported, NONE, None, lines) is plain
    assert not searched_clips(recipe, imported, NONE, None, lines, measure=False).clips


GRIDS: list[dict[str, Any]] = [
    {"scheme": "w4a4", "activation_clip": "auto", "rotate": "r1,r2,r4"},
    {"scheme": "w4a4", "activation_symmetric": False, "activation_clip": "auto", "rotate": "auto"},
    {"scheme": "w6a6", "activation_symmetric": False},
    {"scheme": "w6a6", "activation_clip": 0.925},
    {"scheme": "w4a4", "activation_clip": 0.8, "target": "tensorrt-rtx", "portable": True},
    {"scheme": "w4a8", "activation_symmetric": False, "target": "tensorrt-rtx", "portable": True},
]


@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_verify_reproduces_every_grid(options: dict[str, Any], tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = directory_of(tiny_model, tmp_path)
    compile_engine(directory, tmp_path / "e.plan", **{"rotate": "r1,r4", **options})
    report = checked(tmp_path / "e.plan", directory)
    assert report.passed, (report.gates, report.notes)
    with EngineFile.open(tmp_path / "e.plan") as file:
        said, rows = str(file.manifest["activations"]), file.manifest["layers"]
    assert ("asymmetric" in said) == (not options.get("activation_symmetric", True))
    clip = options.get("activation_clip", 1.0)
    if clip == "auto":
        assert "clip searched per tensor" in said
        marked = [row for row in rows if "activation_clip" in row]
        assert len(marked) == 4 * 2
        assert any("+" in row["name"] for row in marked)
    else:
        assert (f"clip {clip:g}" in said) == (clip != 1)
    if options.get("target") is None:
        assert f"activations are {said}" in inspect_engine(tmp_path / "e.plan").to_text()


def test_branches_read_what_their_linears_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = directory_of(tiny_model, tmp_path)
    adapter = save_peft(directory, tmp_path / "adapter")
    options: dict[str, Any] = {"activation_clip": "auto", "activation_symmetric": False}
    compile_engine(
        directory, tmp_path / "e.plan", scheme="w4a4", rotate="none", adapter=adapter, merge="branch", **options
    )
    report = verify_engine(
        tmp_path / "e.plan", directory, adapter=adapter, token_ids=IDS, tokens=120, window=60, threads=1
    )
    assert report.passed, (report.gates, report.notes)


def test_the_same_ratios_give_the_same_engine(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = directory_of(tiny_model, tmp_path)
    options: dict[str, Any] = {"scheme": "w4a4", "rotate": "r1,r4", "activation_clip": "auto"}
    first, second = (compile_engine(directory, tmp_path / f"{n}.plan", **options) for n in (1, 2))
    assert first.sha256 == second.sha256
    assert first.sha256 != compile_engine(directory, tmp_path / "3.plan", **{**options, "activation_clip": 1.0}).sha256


@pytest.mark.parametrize("clip", [0.8, "auto"])
def test_another_ratio_than_the_one_said_is_refused(
    clip: Any, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, plain = directory_of(tiny_model, tmp_path), activations._round

    def altered(model: ir.Model, build: Any, x: ir.Value, grid: TokenGrid) -> ir.Value:
        return plain(model, build, x, replace(grid, clip=grid.clip - 0.01) if "o_proj" in build.scope else grid)

    monkeypatch.setattr(activations, "_round", altered)
    compile_engine(directory, tmp_path / "e.plan", scheme="w4a4", rotate="none", activation_clip=clip)
    with pytest.raises(EngineFormatError, match=r"o_proj\.weight divides what it reads by"):
        checked(tmp_path / "e.plan", directory)


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_beyond_the_clipped_range_fail(
    symmetric: bool, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, plain = directory_of(tiny_model, tmp_path), activations.Builder.op

    def op(self: Any, kind: str, *inputs: Any, **options: Any) -> ir.Value:
        last = inputs[0].name or "" if inputs else ""
        rounded = inputs and inputs[0].producer() is not None and inputs[0].producer().op_type in ("Round", "Max")
        if rounded and kind in ("Clip", "Min") and last:
            return inputs[0]
        return plain(self, kind, *inputs, **options)

    monkeypatch.setattr(activations.Builder, "op", op)
    options = {"activation_clip": 0.7, "activation_symmetric": symmetric}
    compile_engine(directory, tmp_path / "e.plan", scheme="w4a4", rotate="none", **options)
    assert "equal_codes" in [gate.name for gate in checked(tmp_path / "e.plan", directory).gates if not gate.passed]


@pytest.mark.parametrize(
    ("values", "error", "said", "hinted"),
    [
        ({"activation_clip": 0}, InputError, "activation_clip is 0", "0.9"),
        ({"activation_clip": 1.2}, InputError, "1.2", "up to 1"),
        ({"activation_clip": float("nan")}, InputError, "nan", "up to 1"),
        ({"activation_clip": "best"}, InputError, "'best'", "auto"),
        ({"activation_clip": True}, InputError, "True", "number"),
        ({"activation_symmetric": 1}, InputError, "activation_symmetric", "true or false"),
        ({"scheme": "w4a16", "activation_clip": 0.9}, SchemeError, "leaves activations in floats", "w4a4"),
        ({"scheme": "w8a16", "activation_symmetric": False}, SchemeError, "leaves activations in floats", "w6a6"),
        ({"scheme": "fp16", "activation_clip": "auto"}, SchemeError, "leaves activations in floats", "w4a4"),
        ({"scheme": "w4a8", "activation_clip": "auto"}, SchemeError, "MatMulNBits", "w4a4"),
        ({"scheme": "w8a8", "activation_symmetric": False}, SchemeError, "the kernel", "w6a6"),
        ({"scheme": "w8a8", "activation_clip": 0.9, "target": "tensorrt-rtx"}, SchemeError, "static scales", "w4a8"),
    ],
    ids=str,
)
def test_grids_that_are_not_there_are_refused(
    values: dict[str, Any], error: type[RqcError], said: str, hinted: str
) -> None:
    with pytest.raises(error) as caught:
        Recipe.from_values(values)
    assert said in caught.value.message
    assert hinted in caught.value.hint


@pytest.mark.parametrize("clip", ["auto", 0.9, "0.85", 1])
def test_a_recipe_of_grids_round_trips(clip: Any) -> None:
    recipe = Recipe.from_values({"scheme": "w4a4", "activation_clip": clip, "activation-symmetric": False})
    assert Recipe.from_values(recipe.to_json()) == recipe
    assert "clips" not in recipe.to_json()


def test_what_cannot_be_searched_says_why(tiny_model: TinyModel, tmp_path: Path) -> None:
    recipe = Recipe.from_values({"scheme": "w4a4", "activation_clip": "auto"})
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        searched_clips(recipe, import_model(tiny_model("llama16")), NONE, None, Lines())
    imported = import_model(directory_of(tiny_model, tmp_path))
    with pytest.raises(ResourceError, match="searching clip ratios takes"):
        searched_clips(replace(recipe, max_memory=1), imported, NONE, None, Lines())
    name = "model.layers.1.input_layernorm.weight"
    model = imported.model
    model.graph.initializers[name].const_value = ir.tensor(np.full(96, np.inf, np.float32), name=name)
    with pytest.raises(CheckpointError, match="is not finite on the calibration text"):
        best_ratios(model, sites_of(model, imported.description), np.full((1, 8), 5), TokenGrid(4))


def test_blocks_by_themselves_are_rounded_by_their_marks(tiny_model: TinyModel) -> None:
    """A layer cut out of a graph, as calibration runs it."""
    from rqc.compiler.calibration.blocks import partition
    from rqc.compiler.passlist import grids
    from rqc.compiler.targets import onnx

    imported = import_model(tiny_model("llama16"))
    recipe = Recipe.from_values({"scheme": "w4a4", "activation_clip": "auto", "rotate": "none"})
    names = [claim.weight for claim in imported.description.claims]
    RecordClips(dict.fromkeys(names, 0.75))(imported.model)
    part = partition(imported.model)[1]
    cut = ir.convenience.extract(imported.model.graph, list(part.inputs), list(part.outputs))
    block = ir.Model(cut, ir_version=imported.model.ir_version)
    for step in [*grids(recipe, imported.description), *onnx.packing(recipe, imported.description)]:
        step(block)
    (rounding,) = [step for step in onnx.activations(recipe) if isinstance(step, QuantizeActivations)]
    assert rounding(block).modified
    divisors = [value for name, value in block.graph.initializers.items() if name.startswith("rqc.limit.9.33")]
    assert len(divisors) == 1
    assert len(list(divisors[0].uses())) == 4
