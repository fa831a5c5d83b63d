"""rqc verify with several adapters: their sum, and each that is switched by name; what is wrong on purpose fails."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from tiny import TinyModel
from tiny_adapters import basis_of, checked, failed, random_deltas, save_peft, talking, verified

from rqc.compiler.adapters import merge as merges
from rqc.compiler.api import compile_engine
from rqc.compiler.cli import main
from rqc.compiler.verify.engine import _Verification
from rqc.models.adapter import write_adapter
from rqc.models.grid import Grid
from rqc.passes import switches
from rqc.runtime.errors import InputError

ALL = "r1,r2,r3,r4"
W4 = Grid(4, 16, True, "mse")


def two(directory: Path, folder: Path) -> list[Path]:
    return [
        save_peft(directory, folder / "one", target_modules=["q_proj", "v_proj", "down_proj"]),
        save_peft(directory, folder / "two", seed=1, r=3, use_rslora=True),
    ]


def in_basis(directory: Path, folder: Path, sites: str, **fields: Any) -> Path:
    pool = fields.pop("pool", 1)
    deltas = random_deltas(directory, rank=2, pool=pool)
    deltas = {name: replace(delta, b=delta.b[::-1].copy()) for name, delta in deltas.items()}
    write_adapter(folder, deltas, basis_of(directory, sites, **fields))
    return folder


@pytest.mark.parametrize("merge", ["fold", "branch"])
@pytest.mark.parametrize("scheme", ["fp32", "w4a16", "w4a8", "w4a4"])
def test_a_sum_of_plain_adapters(scheme: str, merge: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama-bias", initializer_range=0.1)
    several = two(directory, tmp_path)
    report = checked(directory, several, tmp_path, scheme=scheme, rotate=ALL, merge=merge)
    assert report.passed, (report.gates, report.notes)
    assert verified(tmp_path / "e.plan", directory, several[::-1]).passed
    for wrong in (several[:1], [several[0], save_peft(directory, tmp_path / "three", seed=2)]):
        with pytest.raises(InputError, match=r"holds the adapter \w{12} and \w{12}"):
            verified(tmp_path / "e.plan", directory, wrong)


@pytest.mark.parametrize("scheme", ["fp32", "w4a16"])
def test_a_dora_and_what_comes_behind_it(scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama-tied", initializer_range=0.1)
    several = [save_peft(directory, tmp_path / "dora", use_dora=True), save_peft(directory, tmp_path / "lora", seed=1)]
    report = checked(directory, several, tmp_path, scheme=scheme, rotate="r1,r4")
    assert report.passed, (report.gates, report.notes)


@pytest.mark.parametrize("options", [{}, {"rotate": "none"}, {"merge": "branch"}], ids=["own", "none", "branch"])
@pytest.mark.parametrize("scheme", ["fp32", "w4a16", "w4a8"])
def test_bases_that_differ(scheme: str, options: dict[str, Any], tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama-tied", initializer_range=0.1)
    several = [save_peft(directory, tmp_path / "plain"), in_basis(directory, tmp_path / "framed", "r1,r4")]
    report = checked(directory, several, tmp_path, scheme=scheme, **options)
    assert report.passed, (report.gates, report.notes)
    assert any("is of another basis (r1,r4)" in note for note in report.notes)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w4a4"])
@pytest.mark.parametrize(("pool", "merge"), [(16, "zero-point"), (1, "branch")])
def test_sums_on_a_grid(pool: int, merge: str, scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama-tied", initializer_range=0.1)
    fields: dict[str, Any] = {"grid": W4, "base_kind": "w4"}
    write_adapter(tmp_path / "one", random_deltas(directory, pool=pool), basis_of(directory, "r1,r4", **fields))
    several = [tmp_path / "one", in_basis(directory, tmp_path / "two", "r1,r4", pool=pool, **fields)]
    report = checked(directory, several, tmp_path, scheme=scheme, merge=merge)
    assert report.passed, (report.gates, report.notes)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w4a4"])
def test_an_adapter_that_is_left_out_fails(
    scheme: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model("llama", initializer_range=0.1)
    several = two(directory, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(merges, "composed", lambda deltas: deltas[0])
        compile_engine(directory, tmp_path / "e.plan", adapter=several, scheme=scheme, rotate=ALL, merge="branch")
    assert "weights" in failed(verified(tmp_path / "e.plan", directory, several))


# By name


def named(directory: Path, folder: Path) -> dict[str, Path]:
    return dict(zip(("poet", "clerk"), two(directory, folder), strict=True))


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(("llama-tied", scheme) for scheme in ("fp32", "fp16", "w4a16", "w4a8", "w4a4")),
        *((name, "w4a16") for name in ("phi3", "gemma2", "qwen2")),
    ],
)
def test_each_by_itself_and_the_model_alone(name: str, scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model(name, initializer_range=0.1)
    sites = "r2,r3,r4" if name == "gemma2" else ALL
    adapters = (
        named(directory, tmp_path)
        if name != "phi3"
        else {
            "poet": save_peft(directory, tmp_path / "one"),
            "clerk": save_peft(directory, tmp_path / "two", seed=1, r=3),
        }
    )
    report = checked(directory, adapters, tmp_path, scheme=scheme, rotate=sites)
    assert report.passed, (report.gates, report.notes)
    assert list(report.each) == ["base", "poet", "clerk"]
    assert {gate.name.partition(":")[0] for gate in report.gates} == set(report.each)
    if scheme in ("fp32", "w4a16"):
        assert report.mean_kl <= 1e-7
    assert len({one.ppl_reference for one in report.each.values()}) == 3


def test_adapters_of_a_grid_by_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama-tied", initializer_range=0.1)
    fields: dict[str, Any] = {"grid": W4, "base_kind": "w4"}
    write_adapter(tmp_path / "one", random_deltas(directory), basis_of(directory, "r1,r4", **fields))
    adapters = {"one": tmp_path / "one", "two": in_basis(directory, tmp_path / "two", "r1,r4", **fields)}
    report = checked(directory, adapters, tmp_path, scheme="w4a8")
    assert report.passed, (report.gates, report.notes)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_ranks_behind_the_wrong_gate_fail(
    scheme: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model("llama", initializer_range=0.1)
    adapters = named(directory, tmp_path)
    plain = switches.SwitchBranches.__init__

    def swapped(self: Any, names: Sequence[str], owners: Any) -> None:
        plain(self, names, {name: [1 - owner for owner in ranks] for name, ranks in owners.items()})

    def leaking(self: Any, names: Sequence[str], owners: Any) -> None:
        plain(self, names, {name: [0, *ranks[1:]] for name, ranks in owners.items()})

    for fault in (swapped, leaking):
        with monkeypatch.context() as patch:
            patch.setattr(switches.SwitchBranches, "__init__", fault)
            compile_engine(directory, tmp_path / "e.plan", adapter=adapters, scheme=scheme, rotate=ALL)
        wrong = failed(verified(tmp_path / "e.plan", directory, adapters))
        assert "clerk:weights" in wrong
        assert "base:weights" not in wrong


def test_branches_that_no_gate_closes_fail(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model("llama", initializer_range=0.1)
    adapters = named(directory, tmp_path)

    def open_all(node: ir.Node, gates: ir.Value) -> None:
        if node.name is None or "down_proj" not in node.name:
            plain(node, gates)

    plain = switches._gate
    with monkeypatch.context() as patch:
        patch.setattr(switches, "_gate", open_all)
        compile_engine(directory, tmp_path / "e.plan", adapter=adapters, scheme="w4a16", rotate=ALL)
    assert "base:weights" in failed(verified(tmp_path / "e.plan", directory, adapters))


def test_names_and_directories_must_fit(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = talking(tiny_model("llama"), tmp_path / "model")
    adapters, engine = named(directory, tmp_path), tmp_path / "e.plan"
    compile_engine(directory, engine, adapter=adapters, scheme="fp32")
    with pytest.raises(InputError, match="holds the adapter poet and clerk, none was given") as error:
        verified(engine, directory, None)
    assert error.value.hint.startswith("--adapter poet=DIR --adapter clerk=DIR: each one")
    with pytest.raises(InputError, match="can switch poet, clerk, given were no names"):
        verified(engine, directory, list(adapters.values()))
    with pytest.raises(InputError, match="given were poet") as error:
        verified(engine, directory, {"poet": adapters["poet"]})
    assert "--adapter clerk=DIR" in error.value.hint
    with pytest.raises(InputError, match=r"holds the adapter \w{12} as poet, .*two is \w{12}"):
        verified(engine, directory, {"poet": adapters["clerk"], "clerk": adapters["poet"]})
    with monkeypatch.context() as patch:
        patch.delattr(_Verification, "run")  # told before any other is compared
        with pytest.raises(InputError, match=r"holds the adapter \w{12} as clerk, .*one is \w{12}"):
            verified(engine, directory, {"poet": adapters["poet"], "clerk": adapters["poet"]})
    compile_engine(directory, tmp_path / "sum.plan", adapter=list(adapters.values()), scheme="fp32")
    with pytest.raises(InputError, match="can switch no adapter, given were poet, clerk"):
        verified(tmp_path / "sum.plan", directory, adapters)
    flags = [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]
    assert main(["verify", str(engine), str(directory), *flags, "--tokens", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["adapters"]) == ["base", "poet", "clerk"]
    assert found["passed"]
    assert all(one["passed"] for one in found["adapters"].values())
    text = main(["verify", str(engine), str(directory), *flags, "--tokens", "40", "--gate", "ppl_ratio=0.1"])
    assert text == 1
    assert "gates failed: base:ppl_ratio, poet:ppl_ratio, clerk:ppl_ratio" in capsys.readouterr().err
