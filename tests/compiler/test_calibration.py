"""Calibration on the IR against PyTorch: what linears read behind blocks that are rounded already, and what is made of
it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import TinyModel, give_voice
from tiny_adapters import save_peft

from rqc.compiler.api import compile_engine
from rqc.compiler.calibration import calibrated as calibrating
from rqc.compiler.calibration import clips as clips_module
from rqc.compiler.calibration import frames, solver
from rqc.compiler.calibration.blockwise import Site, calibrate
from rqc.compiler.calibration.calibrated import calibrated, calibration_need
from rqc.compiler.calibration.calibration_text import calibration_ids, divided
from rqc.compiler.calibration.compensation import budgeted_ranks
from rqc.compiler.calibration.findings import CodeStore, Findings
from rqc.compiler.calibration.memory import calibration_bytes
from rqc.compiler.calibration.solver import Solver
from rqc.compiler.importer import import_model
from rqc.compiler.recipe import Recipe
from rqc.compiler.sizes import block_bytes
from rqc.compiler.text import calibration_text, read_tokenizer
from rqc.compiler.verify.engine import verify_engine
from rqc.compiler.widths import linear_grid
from rqc.models.eora import eora
from rqc.models.fake_quant import GraphGrid, quantize_inputs, recording
from rqc.models.gptq import Order, gptq
from rqc.models.grid import Grid, quantize
from rqc.models.moments import Moments
from rqc.models.reference import Reference
from rqc.models.sparsity import two_of_four
from rqc.models.token_grid import TokenGrid
from rqc.models.weights import Weight
from rqc.passes.base import CLIP
from rqc.passes.quantize import QuantizeLinears
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import InputError, ResourceError, SchemeError

Array = NDArray[np.float64]


class Lines:
    """Progress as a list."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, label: str, done: int, total: int) -> None:
        pass


QUICK: dict[str, Any] = {"method": "gptq", "calibration_samples": 4, "calibration_length": 48, "rotate": "none"}


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "qwen2", "olmo2"])
def test_moments_are_those_of_what_pytorch_reads_behind_rounded_blocks(name: str, tiny_model: TinyModel) -> None:
    """Every block is seen in float, behind blocks that were rounded: no float model's inputs, no rounded model's."""
    imported, grid = import_model(tiny_model(name)), Grid(3, 16)
    ids = np.random.default_rng(0).integers(3, 96, (6, 20))
    store, sites = CodeStore(), list[Site]()

    def solve(site: Site) -> None:
        sites.append(site)
        for weight, lazy in site.weights.items():
            store[weight] = quantize(lazy.read(), grid)

    every = imported.description.by_weight
    rounds = QuantizeLinears(imported.description, grid, found=store.found)
    calibrate(imported.model, every, ids, solve, lambda names: [rounds])
    reference = Reference.load(tiny_model(name))
    names = [weight for site in sites for weight in site.weights]
    assert sorted(names) == sorted(claim.weight for claim in imported.description.claims)
    for site in sites:
        total = np.zeros((site.moments.width,) * 2)
        first = next(iter(site.weights))
        for row in ids:
            with recording(reference, [first]) as record:
                reference.logits(row)
            total += record.inputs[first].T.astype(np.float64) @ record.inputs[first]
        np.testing.assert_allclose(site.moments.second, total, rtol=1e-3, atol=1e-4 * np.abs(total).max())
        assert site.moments.tokens == ids.size
        last = sites.index(site) + 1 == len(sites) or sites[sites.index(site) + 1].block != site.block
        if last:
            for weight in (weight for one in sites if one.block == site.block for weight in one.weights):
                reference.set_weight(weight, store.found[weight]().dequantize())


@dataclass(frozen=True)
class InMemory:
    """A checkpoint of arrays."""

    arrays: Mapping[str, Array]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        return self.arrays[name][start:stop]


class Watched(calibrating.Solver):
    """A compile's solver that keeps its sites, and the weights that it makes."""

    sites: ClassVar[list[Site]] = []
    made: ClassVar[dict[str, Any]] = {}
    branches: ClassVar[dict[str, Any]] = {}

    def __call__(self, site: Site) -> None:
        super().__call__(site)
        self.sites.append(site)
        self.made |= {name: self.findings.found[name]().dequantize() for name in site.weights}
        self.branches |= {name: delta.dense() for name, delta in self.findings.deltas.items()}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    Watched.sites, Watched.made, Watched.branches = [], {}, {}
    monkeypatch.setattr(calibrating, "Solver", Watched)
    return Watched


def test_a_compile_fits_codes_to_what_its_engine_reads(
    watched: type[Watched], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Rounded inputs, behind a block whose weights and inputs were rounded; clipped low, for rounding is little. And to
    the weight that suits these, which is another."""
    directory, grid = give_voice(tiny_model("llama16")), TokenGrid(4, True, 0.6)
    options = {**QUICK, "scheme": "w4a4", "activation_clip": 0.6, "embedding_bits": 32, "head_bits": 32}
    compile_engine(directory, tmp_path / "e.plan", **options)
    ids = calibration_ids(Recipe.from_values(options), import_model(directory), 4 * 48)
    reference = Reference.load(directory)
    assert ids is not None
    for layer in (0, 1):
        site = next(one for one in watched.sites if f"layers.{layer}." in next(iter(one.weights)))
        first, wanted = next(iter(site.weights)), np.zeros((site.moments.width,) * 2)
        for row in ids:
            with recording(reference, [first]) as record:
                reference.logits(row)
            rounded = grid.round(record.inputs[first]).astype(np.float64)
            wanted += rounded.T @ rounded
        assert np.linalg.norm(site.moments.second - wanted) < 2e-3 * np.linalg.norm(wanted)
        assert site.moments.cross is not None  # codes make up for the rounding too
        here = [name for name in watched.made if f"layers.{layer}." in name]
        for name in here:
            reference.set_weight(name, watched.made[name])
        quantize_inputs(reference, dict.fromkeys(here, GraphGrid(grid)))
    site, codes = watched.sites[0], linear_grid(Recipe.from_values(options))
    assert isinstance(codes, Grid)
    own, suited = (
        np.concatenate([change(weight.read()) for weight in site.weights.values()])
        for change in (np.asarray, site.moments.suited)
    )
    fitted = gptq(suited, Order.of(site.moments.second, codes.group_size), codes).dequantize()
    assert np.array_equal(np.concatenate([watched.made[name] for name in site.weights]), fitted)
    assert np.linalg.norm(suited - own) > 1e-2 * np.linalg.norm(own), "otherwise this test shows nothing"


def test_branches_make_up_for_rounded_activations_too(
    watched: type[Watched], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Of the first linears, in front of which nothing was rounded: moments, and the branch that they ask for."""
    directory, grid = give_voice(tiny_model("llama16")), TokenGrid(4, True, 0.6)
    options = {**QUICK, "scheme": "w4a4", "activation_clip": 0.6, "embedding_bits": 32, "head_bits": 32}
    compile_engine(directory, tmp_path / "e.plan", **options, compensate="eora", compensate_rank=8)
    ids = calibration_ids(Recipe.from_values(options), import_model(directory), 4 * 48)
    reference, site = Reference.load(directory), watched.sites[0]
    first, cross = next(iter(site.weights)), np.zeros((site.moments.width,) * 2)
    assert ids is not None
    for row in ids:
        with recording(reference, [first]) as record:
            reference.logits(row)
        z = record.inputs[first]
        cross += z.T.astype(np.float64) @ grid.round(z)
    assert site.moments.cross is not None
    assert np.linalg.norm(site.moments.cross - cross) < 1e-5 * np.linalg.norm(cross)
    assert np.linalg.norm(site.moments.second - cross) > 1e-2 * np.linalg.norm(cross)
    for name, weight in site.weights.items():
        missing = site.moments.suited(weight.read()) - watched.made[name]
        wanted = eora(missing, site.moments.second, 8).dense()
        assert np.linalg.norm(watched.branches[name] - wanted) < 1e-3 * np.linalg.norm(wanted)


def test_linears_without_a_norm_in_front_have_branches_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    """OLMo 2: what q, k and v read is what the block in front gives on."""
    directory = give_voice(tiny_model("olmo2", initializer_range=0.1))
    options = {**QUICK, "scheme": "w3a16", "compensate": "eora", "compensate_rank": 8}
    compile_engine(directory, tmp_path / "e.plan", **options)
    ids = np.random.default_rng(1).integers(3, 96, 200).tolist()
    report = verify_engine(tmp_path / "e.plan", directory, token_ids=ids, tokens=200, window=100, threads=1)
    assert report.passed, report.gates


def test_a_budget_of_branches_is_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    """In bits of codes, also where these lose a little: floats would take three times as much."""
    directory = give_voice(tiny_model("llama16", initializer_range=0.1))
    options = {**QUICK, "scheme": "w4a16"}
    bare = compile_engine(directory, tmp_path / "bare.plan", **options)
    full = compile_engine(directory, tmp_path / "full.plan", **options, compensate="eora", compensate_budget=4.0)
    description = import_model(directory).description
    weights = sum(prod(description.shape(claim)) for claim in description.claims)
    assert full.estimate is not None
    assert bare.estimate is not None
    added = full.estimate.size_bytes - bare.estimate.size_bytes  # of tensors alone: files are aligned
    assert 2 < 8 * added / weights < 5


def test_few_tokens_are_told(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory, lines = give_voice(tiny_model("llama16")), Lines()
    (tmp_path / "text.txt").write_text("few words and no more")
    options = {"calibration": tmp_path / "text.txt", "rotate": "none", "calibration_length": 8, "scheme": "w4a4"}
    compile_engine(directory, tmp_path / "e.plan", **options, method="gptq", activation_clip="auto", progress=lines)
    assert sum("tokens tell little of linears with 152 inputs" in line for line in lines.lines) == 1
    assert sum(line.startswith("activation clip auto: the text holds") for line in lines.lines) == 1
    compile_engine(directory, tmp_path / "e.plan", **{**options, "scheme": "w4a16"}, bits_budget=3, progress=lines)
    assert sum(line.startswith("bits budget 3: the text holds") for line in lines.lines) == 1


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_ranks_within_a_budget_do_not_ask_how_large_an_output_is(method: str, tiny_model: TinyModel) -> None:
    """Norms and gates behind a linear scale what it writes at will: a hundred times as much takes no more ranks."""
    description = import_model(tiny_model("llama16")).description
    options = {"scheme": "w3a16", "method": method, "compensate": "eora", "compensate_budget": 3.0}
    recipe, draw = Recipe.from_values(options), np.random.default_rng(0)
    names = [f"model.layers.0.{name}_proj.weight" for name in ("self_attn.o", "mlp.down")]
    drawn = {name: draw.standard_normal(description.shape(description.by_weight[name])) for name in names}
    moments = {name: Moments(w.shape[1]) for name, w in drawn.items()}
    for one in moments.values():
        one.add(draw.standard_normal((300, one.width)) * np.exp(draw.standard_normal(one.width)))

    def ranks(weights: Mapping[str, Array]) -> dict[str, int]:
        solver = Solver(recipe, QuantizeLinears(description, linear_grid(recipe)), findings := Findings(0))
        for name, w in weights.items():
            solver(Site("layer 0", {name: Weight(InMemory(weights), name, w.shape)}, moments[name]))
        return budgeted_ranks(recipe, findings.spectra, {name: (len(w), w.shape[1]) for name, w in weights.items()})

    plain = ranks(drawn)
    assert all(0 < rank < 96 for rank in plain.values())
    for name in names:
        assert ranks({**drawn, name: 100 * drawn[name]}) == plain


@pytest.mark.parametrize("prune", ["magnitude", "wanda"])
def test_it_prunes_as_asked(prune: str, watched: type[Watched], tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = give_voice(tiny_model("llama16"))
    options = {**QUICK, "method": "rtn", "scheme": "w8a16", "sparsity": "2:4", "prune": prune}
    compile_engine(directory, tmp_path / "e.plan", **options)
    for site in watched.sites:
        for name, weight in site.weights.items():
            norms = np.sqrt(np.diagonal(site.moments.second)) if prune == "wanda" else None
            assert not watched.made[name][~two_of_four(weight.read(), norms)].any()


@pytest.mark.parametrize(
    "options",
    [
        {"compensate": "loftq", "compensate_rank": 8},
        {"compensate": "loftq", "compensate_budget": 1.0},
        {"sparsity": "2:4", "prune": "magnitude"},
    ],
)
def test_what_weights_alone_decide_needs_no_text(
    options: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Without a tokenizer; and the file is the same whatever text is named."""
    directory = tiny_model("llama16", initializer_range=0.1)
    asked = {"scheme": "w3a16", "rotate": "r1,r4", **options}
    made = compile_engine(directory, tmp_path / "e.plan", **asked)
    (tmp_path / "other.txt").write_text("zyxw! " * 200)
    lines = Lines()
    named = compile_engine(
        directory, tmp_path / "named.plan", **asked, calibration=tmp_path / "other.txt", progress=lines
    )
    assert made.sha256 == named.sha256
    assert any("the text is not looked at" in line for line in lines.lines)
    assert any("on the weights alone, error" in line for line in lines.lines)
    ids = np.random.default_rng(1).integers(3, 96, 200).tolist()
    report = verify_engine(tmp_path / "e.plan", directory, token_ids=ids, tokens=200, window=100, threads=1)
    assert report.passed, report.gates
    with pytest.raises(InputError, match="has no tokenizer"):
        compile_engine(directory, tmp_path / "e.plan", scheme="w3a16", compensate="eora", rotate="r1,r4")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-tied", {"scheme": "w4a16", "rotate": "r1,r2,r4"}),
        ("qwen3", {"scheme": "w4a8", "symmetric": False}),
        ("mixtral", {"scheme": "w3a16", "group_size": -1}),
        ("phi3", {"scheme": "w4a4", "rotate": "r1,r4", "group_size": 64}),
        ("gemma3", {"scheme": "w2a16", "rotate": "r4"}),
    ],
)
def test_a_calibrated_engine_is_verified(
    name: str, options: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = give_voice(tiny_model(name, initializer_range=0.1))
    compile_engine(directory, tmp_path / "e.plan", **{**QUICK, **options})
    ids = np.random.default_rng(1).integers(3, 96, 200).tolist()
    report = verify_engine(tmp_path / "e.plan", directory, token_ids=ids, tokens=200, window=100, threads=1)
    assert report.passed, report.gates
    with EngineFile.open(tmp_path / "e.plan") as engine:
        assert engine.manifest["method"] == "gptq"
        said = json.loads(engine.read("report.json"))["calibration"]
    assert said["tokens"] == 4 * 48
    fits = said["linears"].values()
    assert all(fit["error"] <= fit["nearest"] for fit in fits)
    assert np.median([fit["error"] / fit["nearest"] for fit in fits]) < 0.9


def test_the_text_decides_and_the_same_text_gives_the_same_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory, digests = give_voice(tiny_model("llama16")), []
    (tmp_path / "other.txt").write_text("zyxw! " * 200)
    for index, text in enumerate((None, None, tmp_path / "other.txt")):
        report = compile_engine(directory, tmp_path / f"{index}.plan", **QUICK, scheme="w4a16", calibration=text)
        digests.append(report.sha256)
    assert digests[0] == digests[1] != digests[2]


def test_neither_the_place_of_a_text_nor_memory_is_in_the_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory, digests = give_voice(tiny_model("llama16")), set()
    for name, memory in (("a", None), ("b", "8GiB")):
        (text := tmp_path / f"{name}.txt").write_text("zyxw! " * 200)
        options = {**QUICK, "scheme": "w4a16", "calibration": text, "max_memory": memory}
        digests.add(compile_engine(directory, tmp_path / "e.plan", **options).sha256)
        with EngineFile.open(tmp_path / "e.plan") as engine:
            assert json.loads(engine.read("report.json"))["text"] == sha256(text.read_bytes()).hexdigest()
    assert len(digests) == 1


def test_memory_is_told_by_the_text_that_is_there(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Not by what was asked for; attention's scores grow with the square of a window, in which they count."""
    (tmp_path / "text.txt").write_text("zyxw! " * 200)
    imported = import_model(give_voice(tiny_model("llama16")))
    options = {**QUICK, "calibration": tmp_path / "text.txt"}
    few, many = (Recipe.from_values({**options, "calibration_samples": count}) for count in (25, 10**6))
    assert 0 < calibration_need(few, imported) == calibration_need(many, imported)
    a = imported.description.architecture
    fine, coarse, by_weights = (
        calibration_need(Recipe.from_values({**options, **more}), imported)
        for more in ({"scheme": "w6a6"}, {"scheme": "w4a4"}, {"method": "rtn", "compensate": "loftq"})
    )
    assert coarse > fine > by_weights > 0
    short, long = (calibration_bytes(imported, 2048 // length, length) for length in (512, 1024))
    assert long - short == 12 * a.heads * 2048 * (1024 - 512)


def test_memory_counts_tables_and_experts(tiny_model: TinyModel) -> None:
    """The embedding runs too; every expert's inputs have moments, and experts are not solved as one weight."""
    small, large = (import_model(tiny_model("llama16", vocab_size=size)) for size in (96, 8192))
    assert calibration_bytes(large, 1, 8) > 12 * 8192 * 96 > calibration_bytes(small, 1, 8)
    few, many = (import_model(tiny_model("qwen3-moe", num_experts=count)) for count in (4, 16))
    a = few.description.architecture
    more = calibration_bytes(many, 1, 8, crossed=True) - calibration_bytes(few, 1, 8, crossed=True)
    assert more >= 12 * (24 * a.expert_size**2 + 3 * 12 * a.hidden_size * a.expert_size)


def test_experts_are_fitted_behind_the_clips_of_the_engine(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """A router reads what gate and up read, and nothing is rounded in front of it."""
    clips: list[float] = []
    rounding = calibrating._rounding

    def noted(recipe: Recipe, node: Any) -> Any:
        clips.append(float(node.metadata_props.get(CLIP, 1.0)))
        return rounding(recipe, node)

    monkeypatch.setattr(calibrating, "_rounding", noted)
    monkeypatch.setattr(clips_module, "RATIOS", (0.8,))
    directory = give_voice(tiny_model("qwen3-moe"))
    compile_engine(directory, tmp_path / "e.plan", **QUICK, scheme="w4a4", activation_clip="auto")
    assert len(clips) == len(watched.sites)
    assert set(clips) == {0.8}
    assert not any(".gate.weight" in name for site in watched.sites for name in site.weights)


def test_experts_solved_in_turn_are_those_solved_as_one(
    monkeypatch: pytest.MonkeyPatch, watched: type[Watched], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """A row's codes depend on no other row: but for ties that the last bit of a product decides."""
    directory, weights = give_voice(tiny_model("mixtral", initializer_range=0.1)), []
    for entries in (1, 1 << 25):
        monkeypatch.setattr(solver, "STACKED", entries)
        compile_engine(directory, tmp_path / "e.plan", **QUICK, scheme="w3a16")
        weights.append(dict(watched.made))
    first = [name for name in weights[0] if "layers.0.block_sparse_moe.experts" in name or "layers.0.mlp" in name]
    assert first
    same = [np.mean(weights[0][name] == weights[1][name]) for name in first]
    assert min(same) > 0.99


def test_method_auto_scores_both_on_text_that_codes_were_not_fitted_to(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory, lines = give_voice(tiny_model("llama16", initializer_range=0.1)), Lines()
    options = {**QUICK, "method": "auto", "rotate": "auto", "scheme": "w3a16"}
    report = compile_engine(directory, tmp_path / "e.plan", **options, progress=lines)
    scores = report.rotation["scores"]
    assert set(scores) == {f"{frame} {method}" for frame in ("none", "r1,r2,r4") for method in ("rtn", "gptq")}
    chosen = f"{report.rotation['chosen']} {report.rotation['method']}"
    assert scores[chosen] <= 1.01 * min(scores.values())
    with EngineFile.open(tmp_path / "e.plan") as engine:
        assert engine.manifest["method"] == report.rotation["method"]
    assert any(line.startswith("rotate auto and method auto: ") for line in lines.lines)


@pytest.mark.parametrize("text", [None, "a few words " * 8, "short"], ids=["ours", "two windows", "one window"])
def test_method_auto_scores_what_comes_behind(
    text: str | None, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def fit(*arguments: Any) -> Any:
        seen["fitted"] = arguments[5]
        return calibrated(*arguments)

    def score(model: Any, ids: Any) -> float:
        seen["scored"] = ids
        return 1.0

    monkeypatch.setattr(frames, "calibrated", fit)
    monkeypatch.setattr(frames, "perplexity", score)
    directory, options = give_voice(tiny_model("llama16")), {**QUICK, "method": "auto", "scheme": "w4a16"}
    if text is not None:
        (tmp_path / "text.txt").write_text(text)
        options["calibration"] = tmp_path / "text.txt"
    compile_engine(directory, tmp_path / "e.plan", **options)
    found = [*seen["fitted"].ravel().tolist(), *seen["scored"].ravel().tolist()]
    tokenizer = read_tokenizer(directory)
    assert tokenizer is not None
    assert found == tokenizer.encode(text or calibration_text(), add_special_tokens=False).ids[: len(found)]


@pytest.mark.parametrize(("count", "length"), [(1, 9), (2, 48), (64, 512), (3, 4096), (20, 100)])
def test_what_is_scored_is_never_what_was_fitted(count: int, length: int) -> None:
    ids = np.arange(count * length).reshape(count, length)
    fitted, scored = divided(ids, 2048)
    assert not set(fitted.flat) & set(scored.flat)
    assert fitted.size >= scored.size


def test_a_text_that_is_too_short_is_said(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words " * 10)
    lines, options = Lines(), {**QUICK, "calibration": tmp_path / "short.txt"}
    compile_engine(give_voice(tiny_model("llama16")), tmp_path / "e.plan", **options, scheme="w4a16", progress=lines)
    assert "calibration: the text holds 2 windows of 48 tokens, 4 were asked for" in lines.lines


def test_windows_that_are_shortened_are_said(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Also where there are as many as asked for: by the end of the text, and by the model's context of 256 tokens."""
    model = give_voice(tiny_model("llama16"))
    (text := tmp_path / "short.txt").write_text("a b c d e f" * 5)
    for options, said in (({"calibration": text}, "55 tokens, 300"), ({}, "256 tokens, 300")):
        short = {"calibration_samples": 1, "calibration_length": 300, **options}
        compile_engine(model, tmp_path / "e.plan", scheme="w4a16", progress=(lines := Lines()), **{**QUICK, **short})
        assert any(f"windows have {said} were asked for" in line for line in lines.lines)


def test_a_single_token_chooses_nothing(tiny_model: TinyModel, tmp_path: Path) -> None:
    (text := tmp_path / "one.txt").write_text("a")
    recipe = {"scheme": "w4a4", "rotate": "auto", "method": "auto", "calibration": text}
    report = compile_engine(give_voice(tiny_model("llama16")), tmp_path / "e.plan", **recipe)
    assert report.rotation == {"chosen": "r1,r2,r4", "scores": None, "method": "rtn"}


@pytest.mark.parametrize("more", [{"method": "auto"}, {"activation_clip": "auto", "rotate": "auto"}])
def test_what_is_too_large_to_measure_is_chosen_by_the_scheme(
    more: dict[str, Any], tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever step of the measurement it is that does not fit."""
    imported, lines = import_model(give_voice(tiny_model("llama16"))), Lines()
    options = {**QUICK, "method": "rtn", "scheme": "w4a4", **more}
    ids = np.zeros((4, 48), np.int64)
    by_steps = Recipe.from_values({**options, "method": "gptq"} if "method" in more else options)
    block = block_bytes(imported, by_steps, 2 * 48, 48)
    needed = frames._needed(by_steps, imported, ids, ids[:2])
    assert needed > block
    for module in (frames, calibrating, clips_module):
        monkeypatch.setattr(module, "resident_bytes", lambda: 0)
    recipe = Recipe.from_values({**options, "max_memory": (block + needed) // 2})
    choice = frames.choose(recipe, imported, lines)
    assert choice.said["scores"] is None
    assert "by the scheme alone, because measuring takes about" in lines.lines[-1]


def test_what_cannot_be_calibrated_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    target = tmp_path / "e.plan"
    with pytest.raises(InputError, match=r"--method gptq.*no tokenizer\.json"):
        compile_engine(tiny_model("llama16"), target, **QUICK)
    with pytest.raises(SchemeError, match="--method gptq with --scheme fp16, which rounds no weights"):
        compile_engine(tiny_model("llama16"), target, **QUICK, scheme="fp16")
    voiced = give_voice(tiny_model("llama16"))
    with pytest.raises(ResourceError, match="calibration takes about"):
        compile_engine(voiced, target, **QUICK, max_memory="64MiB")
    with pytest.raises(ResourceError, match=r"calibration takes about.*") as caught:
        compile_engine(voiced, target, compensate="loftq", rotate="none", max_memory="64MiB")
    assert "--compensate loftq" in caught.value.hint
    short, long = (calibration_bytes(import_model(voiced), 4, length) for length in (48, 96))
    assert short < long
    assert not list(tmp_path.iterdir())


def test_norms_of_fitted_codes_are_not_found_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = give_voice(tiny_model("llama16"))
    options = {**QUICK, "scheme": "w4a16", "adapter": save_peft(directory, tmp_path / "dora", use_dora=True)}
    with pytest.raises(SchemeError, match=r"--method gptq with --merge branch: .*dora is a DoRA"):
        compile_engine(directory, tmp_path / "e.plan", **options, merge="branch")
    lines = Lines()
    compile_engine(directory, tmp_path / "e.plan", **{**options, "method": "auto"}, merge="branch", progress=lines)
    assert "method auto: rtn, there is no other here" in lines.lines
    compile_engine(directory, tmp_path / "e.plan", **options, merge="fold", min_survival=-9)


def test_a_folded_adapter_is_rounded_with_its_weight(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = give_voice(tiny_model("llama16", initializer_range=0.1))
    adapter = save_peft(directory, tmp_path / "adapter", r=4)
    compile_engine(directory, tmp_path / "e.plan", **QUICK, scheme="w4a16", adapter=adapter)
    ids = np.random.default_rng(1).integers(3, 96, 120).tolist()
    report = verify_engine(tmp_path / "e.plan", directory, adapter=adapter, token_ids=ids, tokens=120, window=60)
    assert report.passed, report.gates


def test_what_a_killed_compile_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "rqc-scratch-codes-abcdefgh").mkdir()  # nobody holds its lock
    alive = CodeStore()
    store = CodeStore()
    assert len(list(tmp_path.iterdir())) == 2
    del alive, store
    assert not list(tmp_path.iterdir())


def test_a_full_disk_of_temporary_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("9216 requested and 2560 written")  # as numpy says it, without a number

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store, codes = CodeStore(), quantize(np.ones((2, 16), np.float32), Grid(4, 16))
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ResourceError, match=f"no space for temporary files in {tmp_path}") as raised:
        store["w"] = codes
    assert "TMPDIR" in raised.value.hint


UNREAD = "calibration: nothing is measured here, the text is not looked at"
READ: list[tuple[bool, dict[str, Any]]] = [
    (False, {"scheme": "w4a16", "rotate": "none"}),
    (False, {"scheme": "fp32"}),
    (False, {"scheme": "fp16", "rotate": "auto"}),
    (True, {"scheme": "w4a16"}),
    (True, {"scheme": "w4a16", "rotate": "none", "method": "auto"}),
    (True, {"scheme": "w4a4", "rotate": "none", "activation_clip": "auto"}),
    (True, {"scheme": "w4a16", "rotate": "none", "bits_budget": 3.0}),
    (True, {"scheme": "w4a16", "rotate": "none", "kv_cache": "int8"}),
    (True, {"scheme": "w4a16", "rotate": "none", "compensate": "eora"}),
    (True, {"scheme": "w8a8", "rotate": "none", "target": "tensorrt-rtx", "portable": True}),
]


@pytest.mark.parametrize(("read", "options"), READ, ids=str)
def test_it_is_said_where_the_text_has_no_use(read: bool, options: dict[str, Any], tiny_model: TinyModel) -> None:
    lines = Lines()
    model = give_voice(tiny_model("llama16"))
    compile_engine(model, None, calibration_samples=4, dry_run=True, progress=lines, **options)
    assert (UNREAD in lines.lines) is not read


def test_it_is_said_where_the_method_is_no_choice(tiny_model: TinyModel) -> None:
    lines = Lines()
    options: dict[str, Any] = {"scheme": "w4a16", "rotate": "none", "dry_run": True, "progress": lines}
    compile_engine(give_voice(tiny_model("llama16")), None, method="auto", compensate="loftq", **options)
    assert "method auto: rtn, there is no other here" in lines.lines


@pytest.mark.parametrize("scheme", ["fp8a16", "nvfp4a16"])
def test_method_auto_rounds_small_floats_to_nearest(scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target": "tensorrt-rtx", "portable": True, "scheme": scheme, "rotate": "none"}
    lines = Lines()
    compile_engine(tiny_model("llama16"), tmp_path / "e.plan", method="auto", progress=lines, **options)
    assert "method auto: rtn, there is no other here" in lines.lines
