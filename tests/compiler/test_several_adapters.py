"""Several adapters in one engine: their sum is peft's with all active; what does not fit together is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny import TinyModel
from tiny_adapters import (
    IDS,
    W4,
    Lines,
    basis_of,
    engine_logits,
    mean_kl,
    on_the_grid,
    random_deltas,
    relative,
    save_peft,
)
from transformers import AutoModelForCausalLM

from rqc.compiler.adapters.sources import AdapterSource, parse_sources
from rqc.compiler.api import compile_engine
from rqc.compiler.cli import main
from rqc.compiler.importer import import_model
from rqc.compiler.recipe import Recipe
from rqc.models.adapter import Adapter, write_adapter
from rqc.models.adapter_frames import to_frame
from rqc.models.algebra import dimensions
from rqc.models.delta import Delta, composed
from rqc.models.grid import Grid, quantize
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import BasisMismatchError, InputError, RqcError, SchemeError
from rqc.runtime.inspection import inspect_engine

FLOAT_TABLES = {"scheme": "w4a16", "embedding_bits": 32, "head_bits": 32}
ALL = "r1,r2,r3,r4"
ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
FFN = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}


def active(model_dir: Path, adapters: Sequence[Path]) -> np.ndarray:
    """Logits of peft with all adapters active, in this order."""
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
    model = PeftModel.from_pretrained(base, str(adapters[0]), adapter_name="0")
    for index, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(str(adapter), adapter_name=str(index))
    model.base_model.set_adapter([str(index) for index in range(len(adapters))])
    with torch.inference_mode():
        logits: np.ndarray = model.eval()(input_ids=torch.from_numpy(IDS)[None], use_cache=False).logits[0].numpy()
    return logits


def sums(*several: Mapping[str, Delta]) -> dict[str, Delta]:
    names = dict.fromkeys(name for deltas in several for name in deltas)
    return {name: composed([deltas[name] for deltas in several if name in deltas]) for name in names}


def other_deltas(directory: Path, **options: Any) -> dict[str, Delta]:
    """Random updates that are not those of `random_deltas`."""
    return {name: replace(d, b=d.b[::-1].copy(), scale=1.5) for name, d in random_deltas(directory, **options).items()}


@pytest.mark.parametrize("sites", ["none", ALL])
@pytest.mark.parametrize("merge", ["fold", "branch"])
@pytest.mark.parametrize("name", ["llama-tied", "phi3"])
def test_the_sum_is_what_peft_computes(
    name: str, merge: str, sites: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model(name)
    one = save_peft(directory, tmp_path / "one")
    two = save_peft(directory, tmp_path / "two", seed=1, r=3, use_rslora=True)
    three = save_peft(directory, tmp_path / "three", seed=2, r=2, target_modules=["o_proj", "down_proj"])
    several = [one, two, three]
    report = compile_engine(directory, tmp_path / "e.plan", adapter=several, merge=merge, scheme="fp32", rotate=sites)
    expected = active(directory, several)
    assert mean_kl(expected, engine_logits(tmp_path / "e.plan")) <= 1e-7
    assert mean_kl(active(directory, several[:2]), expected) > 1e-5
    assert min((report.survival or {}).values()) > 0.999


@pytest.mark.parametrize("sites", ["none", ALL])
def test_a_dora_may_come_first_where_weights_are_folded(sites: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama-tied")
    dora = save_peft(directory, tmp_path / "dora", use_dora=True)
    lora = save_peft(directory, tmp_path / "lora", seed=1)
    options: dict[str, Any] = {"scheme": "fp32", "rotate": sites}
    compile_engine(directory, tmp_path / "e.plan", adapter=[dora, lora], **options)
    assert mean_kl(active(directory, [dora, lora]), engine_logits(tmp_path / "e.plan")) <= 1e-7
    with pytest.raises(SchemeError, match=r"dora is a DoRA.*has to be the first adapter.*lora comes before") as error:
        compile_engine(directory, tmp_path / "e.plan", adapter=[lora, dora], **options)
    assert error.value.hint == f"giving {dora} first"
    with pytest.raises(SchemeError, match=r"dora is a DoRA.*lora updates that too") as error:
        compile_engine(
            directory, tmp_path / "e.plan", adapter=[dora, lora], merge="branch", scheme="w4a16", rotate="none"
        )
    assert "--merge fold" in error.value.hint


def test_a_dora_goes_with_what_updates_other_linears(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama-tied")
    lora = save_peft(directory, tmp_path / "lora", **FFN)
    dora = save_peft(directory, tmp_path / "dora", use_dora=True, **ATTENTION)
    compile_engine(directory, tmp_path / "e.plan", adapter=[lora, dora], scheme="fp32", rotate="none")
    assert mean_kl(active(directory, [lora, dora]), engine_logits(tmp_path / "e.plan")) <= 1e-7
    compile_engine(directory, tmp_path / "q.plan", adapter=[lora, dora], merge="branch", rotate="none")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_each_basis_is_carried_exactly(order: tuple[int, ...], tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama-tied")
    imported = import_model(directory)
    plain = [save_peft(directory, tmp_path / f"plain-{seed}", seed=seed) for seed in range(3)]
    adapters = [plain[0]]
    for path, sites in zip(plain[1:], ("r1,r4", "r2"), strict=True):
        rotation, target = Rotation.parse(sites), tmp_path / f"in-{sites}"
        opened = Adapter.open(path, imported.description)
        deltas = {
            name: to_frame(name, delta, imported.description, rotation, imported.checkpoint.read)
            for name, delta in opened.deltas.items()
        }
        write_adapter(target, deltas, basis_of(directory, sites))
        adapters.append(target)
    several, expected = [adapters[index] for index in order], active(directory, plain)
    for options in ({}, {"rotate": "r1"}, {"rotate": "none"}, {"merge": "branch"}):
        report = compile_engine(directory, tmp_path / "e.plan", adapter=several, scheme="fp32", **options)
        assert mean_kl(expected, engine_logits(tmp_path / "e.plan")) <= 1e-7
        if "rotate" not in options:
            assert report.rotation["chosen"] == str(Rotation.parse("r1,r4" if order[0] == 0 else "r2"))


def test_one_branch_holds_all_ranks(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    one, two = random_deltas(directory), other_deltas(directory, rank=3)
    two = {name: delta for name, delta in two.items() if "k_proj" not in name}
    for name, deltas in (("one", one), ("two", two)):
        write_adapter(tmp_path / name, deltas, basis_of(directory, "r1,r4", **W4))
    several = [tmp_path / "one", tmp_path / "two"]
    report = compile_engine(directory, tmp_path / "e.plan", adapter=several, **FLOAT_TABLES)
    compile_engine(directory, tmp_path / "one.plan", adapter=several[0], **FLOAT_TABLES)
    assert relative(engine_logits(tmp_path / "e.plan"), on_the_grid(directory, "r1,r4", sums(one, two))) <= 1e-4
    rows = [EngineFile.open(tmp_path / f"{n}.plan").manifest["layers"] for n in ("e", "one")]
    assert [row["name"] for row in rows[0]] == [row["name"] for row in rows[1]]
    shapes = {row["name"]: row["shape"][0] for row in rows[0] if row["name"].endswith("branch A")}
    assert set(shapes.values()) == {7 + 4 + 7, 7, 14}
    assert report.survival == dict.fromkeys(one, 1.0)


def test_zero_points_move_by_the_sum(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("phi3")
    several = [random_deltas(directory, pool=16), other_deltas(directory, pool=32)]
    for index, deltas in enumerate(several):
        write_adapter(tmp_path / f"{index}", deltas, basis_of(directory, "r1,r4", **W4, adapter_type="qalora"))
    paths = [tmp_path / "0", tmp_path / "1"]
    report = compile_engine(directory, tmp_path / "e.plan", adapter=paths, **FLOAT_TABLES)
    assert EngineFile.open(tmp_path / "e.plan").manifest["adapter"]["merge"] == "zero-point"
    assert relative(engine_logits(tmp_path / "e.plan"), on_the_grid(directory, "r1,r4", sums(*several))) <= 1e-4
    assert min((report.survival or {}).values()) == 1.0
    write_adapter(tmp_path / "1", other_deltas(directory), basis_of(directory, "r1,r4", **W4))
    compile_engine(directory, tmp_path / "e.plan", adapter=paths, **FLOAT_TABLES)
    assert EngineFile.open(tmp_path / "e.plan").manifest["adapter"]["merge"] == "branch"
    with pytest.raises(SchemeError, match="not constant in blocks"):
        compile_engine(directory, tmp_path / "e.plan", adapter=paths, merge="zero-point")


def test_survival_is_that_of_the_sum(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    several = [random_deltas(directory, size=0.01), other_deltas(directory, size=0.02)]
    for index, deltas in enumerate(several):
        write_adapter(tmp_path / f"{index}", deltas, None)
    paths = [tmp_path / "0", tmp_path / "1"]
    report = compile_engine(directory, tmp_path / "e.plan", adapter=paths, rotate="none")
    reference, grid = Reference.load(directory), Grid(4, 32, True, "mse")
    for name, delta in sums(*several).items():
        weight, added = reference.parts[name].weight.double().numpy(), delta.dense()
        kept = (quantize(weight + added, grid).dequantize() - quantize(weight, grid).dequantize()).astype(np.float64)
        assert (report.survival or {})[name] == pytest.approx((kept * added).sum() / (added**2).sum(), abs=1e-4)


# What does not fit together


def test_grids_that_differ_are_refused_by_both_names(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    write_adapter(tmp_path / "one", random_deltas(directory), basis_of(directory, "r4", **W4))
    for grid in (Grid(4, 32, False, "mse"), Grid(4, 16, True, "mse"), Grid(3, 16, False, "mse")):
        fields = {"grid": grid, "base_kind": f"w{grid.bits}"}
        write_adapter(tmp_path / "two", other_deltas(directory), basis_of(directory, "r4", **fields))
        with pytest.raises(SchemeError) as error:
            compile_engine(directory, tmp_path / "e.plan", adapter=[tmp_path / "one", tmp_path / "two"])
        for word in (tmp_path / "one", tmp_path / "two", "4 bits in groups of 16, asymmetric", f"of {grid.group_size}"):
            assert str(word) in error.value.message


def test_bases_that_cannot_be_left_are_refused_by_both_names(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    dims = dimensions(import_model(directory).description)
    for name, sites, deltas in (
        ("one", "r1,r4", random_deltas(directory)),
        ("two", "r1,r2", other_deltas(directory)),
    ):
        write_adapter(tmp_path / name, deltas, basis_of(directory, sites, **W4))
    with pytest.raises(BasisMismatchError) as error:
        compile_engine(directory, tmp_path / "e.plan", adapter=[tmp_path / "one", tmp_path / "two"])
    for sites, name in (("r1,r4", "one"), ("r1,r2", "two")):
        assert Rotation.parse(sites).basis(dims)[:12] in error.value.message
        assert str(tmp_path / name) in error.value.message
    write_adapter(tmp_path / "one", random_deltas(directory), basis_of(directory, "r1,r4"))  # a float base: carried
    compile_engine(directory, tmp_path / "e.plan", adapter=[tmp_path / "one", tmp_path / "two"])
    assert EngineFile.open(tmp_path / "e.plan").manifest["rotation"]["sites"] == ["r1", "r2"]
    assert not list(tmp_path.glob("*.plan.*"))


def test_twice_the_same_and_loftq_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    one = save_peft(directory, tmp_path / "one")
    with pytest.raises(InputError, match="are the same adapter"):
        compile_engine(directory, tmp_path / "e.plan", adapter=[one, one])
    residual = {n: replace(d, scale=1.0) for n, d in random_deltas(directory, rank=2).items()}
    basis = basis_of(directory, "none", **W4, residual=True)
    write_adapter(tmp_path / "loftq", random_deltas(directory), basis, residual=residual)
    with pytest.raises(SchemeError, match=r"loftq repairs the rounding"):
        compile_engine(directory, tmp_path / "e.plan", adapter=[one, tmp_path / "loftq"])


def test_the_second_adapter_of_another_base_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    mine, other = tiny_model("llama16"), tiny_model("llama16", rms_norm_eps=1e-5)
    one = save_peft(mine, tmp_path / "one")
    write_adapter(tmp_path / "two", random_deltas(mine), basis_of(other, "r1"))
    with pytest.raises(InputError, match="was trained on the base"):
        compile_engine(mine, tmp_path / "e.plan", adapter=[one, tmp_path / "two"])


def test_two_doras_of_one_linear_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama-tied")
    several = [save_peft(directory, tmp_path / str(seed), seed=seed, use_dora=True) for seed in range(2)]
    with pytest.raises(SchemeError, match=r"1 is a DoRA.*has to be the first adapter") as error:
        compile_engine(directory, tmp_path / "e.plan", adapter=several, scheme="fp32", rotate="none")
    assert error.value.hint == "giving each alone"


def test_the_one_that_cannot_be_read_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    one = save_peft(directory, tmp_path / "one")
    two = save_peft(tiny_model("llama16", num_hidden_layers=3), tmp_path / "two")
    with pytest.raises(InputError) as error:
        compile_engine(directory, tmp_path / "e.plan", adapter=[one, two])
    assert error.value.message.startswith(f"{two}: the adapter has a part for 'model.layers.2.")


# How they are named


def test_an_option_names_adapters_in_every_form(tmp_path: Path) -> None:
    assert parse_sources(None) == parse_sources([]) == ()
    plain = (AdapterSource(Path("a")), AdapterSource(Path("b=c/d")), AdapterSource(Path("x/y=z")))
    assert parse_sources(["a", Path("b=c/d"), "x/y=z"]) == plain
    named = (AdapterSource(Path("a/b"), "poet"), AdapterSource(Path("c=d"), "v1.2"))
    assert parse_sources(["poet=a/b", "v1.2=c=d"]) == parse_sources({"poet": "a/b", "v1.2": Path("c=d")}) == named
    for sources in (plain, named, (AdapterSource(Path("a=b")),)):
        recipe = Recipe(adapter=sources)
        assert Recipe.from_values(recipe.to_json()) == recipe
    (tmp_path / "r.toml").write_text('adapter = ["one", "two"]')
    assert [source.path for source in Recipe.load(tmp_path / "r.toml").adapter] == [tmp_path / "one", tmp_path / "two"]
    (tmp_path / "r.toml").write_text('[adapter]\npoet = "one"\n')
    assert Recipe.load(tmp_path / "r.toml").adapter == (AdapterSource(tmp_path / "one", "poet"),)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (["poet=a", "b"], "1 of 2 adapters have names"),
        (["poet=a", "poet=b"], "two adapters are called 'poet'"),
        ("base=a", "cannot be called 'base'"),
        ("none=a", "cannot be called 'none'"),
        ("=a", "cannot be called ''"),
        ("a b=c", "cannot be called 'a b'"),
        ("poet=", "adapter is ''"),
        ("", "adapter is ''"),
        (3, "adapter is 3"),
        ([["a"]], r"adapter is \['a'\]"),
        ({"poet": 3}, "adapter is 3"),
    ],
)
def test_names_that_are_none_are_refused(value: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(RqcError, match=told):
        Recipe.from_values({"adapter": value})


def test_a_recipe_that_names_no_adapters_is_told_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("adapter = [1]")
    with pytest.raises(InputError, match=r"r\.toml: adapter is 1"):
        Recipe.load(tmp_path / "r.toml")


def test_the_command_line_and_the_engine_tell_of_all(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_model("llama16")
    one = save_peft(directory, tmp_path / "one")
    two = save_peft(directory, tmp_path / "two", seed=1, r=3, **ATTENTION)
    arguments = ["compile", str(directory), "-o", str(tmp_path / "e.plan"), "--scheme", "fp32"]
    assert main([*arguments, "--adapter", str(one), "--adapter", str(two)]) == 0
    told = capsys.readouterr().err
    assert "adapter: lora, 14 linears, merged by fold" in told
    assert "adapter: lora, 8 linears, merged by fold" in told
    record = inspect_engine(tmp_path / "e.plan").to_json()["adapter"]
    prints = [Adapter.open(path, import_model(directory).description).fingerprint for path in (one, two)]
    assert [part["fingerprint"] for part in record["adapters"]] == prints
    assert (record["kind"], record["merge"], record["linears"], record["rank"]) == ("lora", "fold", 14, 7)
    assert "names" not in record
    assert "2 adapters (lora), folded into the weights" in inspect_engine(tmp_path / "e.plan").to_text()


def test_the_order_of_sums_does_not_matter_for_what_is_measured(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory, lines = tiny_model("llama16"), Lines()
    several = [save_peft(directory, tmp_path / str(seed), seed=seed) for seed in range(2)]
    found = [
        compile_engine(directory, tmp_path / "e.plan", adapter=order, rotate="r4", progress=lines, verify_each=True)
        for order in (several, several[::-1])
    ]
    assert found[0].survival == pytest.approx(found[1].survival, abs=2e-4)
