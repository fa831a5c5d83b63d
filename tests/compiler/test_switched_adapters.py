"""Adapters by name: one graph holds them all, a gate for each; what cannot be switched is refused with its reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny import TinyModel
from tiny_adapters import IDS, W4, Lines, basis_of, mean_kl, peft_logits, random_deltas, save_merged, save_peft, talking

from rqc.compiler.api import compile_engine
from rqc.compiler.cli import main
from rqc.compiler.verify.stored import StoredGraph
from rqc.models.adapter import write_adapter
from rqc.passes.base import BRANCH_A
from rqc.passes.switches import SwitchBranches
from rqc.runtime.container import EngineFile
from rqc.runtime.engine import Engine
from rqc.runtime.errors import InputError, SchemeError, UnsupportedModelError
from rqc.runtime.inspection import inspect_engine

ALL = "r1,r2,r3,r4"


def adapters_of(directory: Path, folder: Path, **config: Any) -> dict[str, Path]:
    return {
        "poet": save_peft(directory, folder / "poet", **config),
        "clerk": save_peft(directory, folder / "clerk", seed=1, r=3, use_rslora=True, **config),
    }


@pytest.mark.parametrize("sites", ["none", ALL])
@pytest.mark.parametrize("name", ["llama-tied", "phi3", "qwen3", "mixtral", "gemma2", "olmo2"])
def test_each_is_what_peft_computes_and_none_is_the_model(
    name: str, sites: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model(name)
    sites = sites.replace("r1,", "") if name in ("gemma2", "olmo2") else sites
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]} if name == "mixtral" else {}
    adapters = adapters_of(directory, tmp_path, **targets)
    options: dict[str, Any] = {"scheme": "fp32", "rotate": sites}
    compile_engine(directory, tmp_path / "e.plan", adapter=adapters, **options)
    compile_engine(directory, tmp_path / "plain.plan", **options)
    with (
        Engine.load(tmp_path / "e.plan", threads=1) as engine,
        Engine.load(tmp_path / "plain.plan", threads=1) as plain,
    ):
        assert engine.adapters == ("poet", "clerk")
        for label, path in adapters.items():
            assert mean_kl(peft_logits(directory, path, IDS), engine.logits(IDS.tolist(), adapter=label)) <= 1e-7
        np.testing.assert_allclose(engine.logits(IDS.tolist()), plain.logits(IDS.tolist()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w6a6"])
def test_one_engine_for_all_agrees_with_an_engine_for_each(scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Also where an adapter leaves linears out that another one has."""
    directory = tiny_model("llama16")
    adapters = adapters_of(directory, tmp_path)
    adapters["small"] = save_peft(directory, tmp_path / "small", seed=2, target_modules=["v_proj", "down_proj"])
    options: dict[str, Any] = {"scheme": scheme, "rotate": "r1,r4", "min_survival": 0.5}
    compile_engine(directory, tmp_path / "e.plan", adapter=adapters, **options)
    with Engine.load(tmp_path / "e.plan", threads=1) as engine:
        for name, path in adapters.items():
            compile_engine(directory, tmp_path / "one.plan", adapter=path, merge="branch", **options)
            with Engine.load(tmp_path / "one.plan", threads=1) as one:
                expected = one.logits(IDS[:8].tolist())
                found = engine.logits(IDS[:8].tolist(), adapter=name)
                assert np.linalg.norm(found - expected) <= (2e-2 if scheme == "w6a6" else 1e-5) * np.linalg.norm(
                    expected
                )


def test_the_graph_pays_one_product_for_each_input(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama-tied")
    adapters = adapters_of(directory, tmp_path)
    compile_engine(directory, tmp_path / "e.plan", adapter=adapters, scheme="w4a16", rotate="r1,r4")
    compile_engine(
        directory, tmp_path / "one.plan", adapter=adapters["poet"], scheme="w4a16", rotate="r1,r4", merge="branch"
    )
    counts = []
    for name in ("e", "one"):
        with EngineFile.open(tmp_path / f"{name}.plan") as file:
            graph = StoredGraph.read(file).model.graph
            counts.append(Counter(node.op_type for node in graph))
            products = sum(BRANCH_A in node.metadata_props for node in graph)
    layers = 2
    assert products == 4 * layers
    added = counts[0] - counts[1]
    assert added == Counter(Mul=products, Gather=3, Unsqueeze=1)  # q+k+v, gate+up, and one rank layout for o and down


def test_the_pass_is_idempotent_and_exact_with_every_gate_open(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    adapters = adapters_of(directory, tmp_path, size=0.3)
    options: dict[str, Any] = {"adapter": adapters, "scheme": "w4a16", "rotate": "r1,r4"}
    report = compile_engine(directory, tmp_path / "e.plan", verify_each=True, **options)
    step = next(item for item in report.passes if item.name == "SwitchBranches")
    assert step.exact
    assert step.drift is not None
    assert step.drift <= 1e-6
    assert step.detail == "poet, clerk"
    dry = compile_engine(directory, None, dry_run=True, **options)
    assert [item.name for item in dry.passes] == [item.name for item in report.passes]
    with EngineFile.open(tmp_path / "e.plan") as file:
        graph = ir.from_proto(onnx.load_model_from_string(file.graph()))
    assert not SwitchBranches(("poet", "clerk"), {})(graph).modified


def test_adapters_bring_their_grid_and_basis(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    one = random_deltas(directory, pool=16)
    two = {name: replace(delta, b=delta.b[::-1].copy()) for name, delta in one.items()}
    write_adapter(tmp_path / "one", one, basis_of(directory, "r1,r4", **W4, adapter_type="qalora"))
    write_adapter(tmp_path / "two", two, basis_of(directory, "r1,r4", **W4))
    plain = save_peft(directory, tmp_path / "plain", seed=3)
    adapters = {"one": tmp_path / "one", "two": tmp_path / "two", "plain": plain}
    compile_engine(directory, tmp_path / "e.plan", adapter=adapters)
    manifest = EngineFile.open(tmp_path / "e.plan").manifest
    assert (manifest["group_size"], manifest["rotation"]["sites"]) == (16, ["r1", "r4"])
    assert manifest["adapter"]["names"] == ["one", "two", "plain"]
    assert [part["name"] for part in manifest["adapter"]["adapters"]] == ["one", "two", "plain"]


def test_auto_scores_the_model_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = talking(tiny_model("llama16"), tmp_path / "model")
    adapters, lines = adapters_of(directory, tmp_path, size=0.3), Lines()
    options: dict[str, Any] = {"scheme": "w4a4", "embedding_bits": 32, "head_bits": 32}
    found = compile_engine(directory, tmp_path / "e.plan", adapter=adapters, progress=lines, **options)
    assert found.rotation == compile_engine(directory, tmp_path / "p.plan", **options).rotation
    assert "adapter clerk: lora, 14 linears, switched at run time" in lines.lines


def test_what_is_said_of_them(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    adapters = adapters_of(directory, tmp_path)
    report = compile_engine(directory, tmp_path / "e.plan", adapter=adapters, rotate="none")
    assert set((report.survival or {}).values()) == {1.0}
    found = inspect_engine(tmp_path / "e.plan")
    record = found.to_json()["adapter"]
    assert (record["kind"], record["merge"], record["survival"]) == ("lora", "branch", 1.0)
    assert (
        "beside the weights, at least 1 of it left in every linear, switched at run time: poet, clerk"
        in found.to_text()
    )
    moved = {name: path.rename(tmp_path / f"moved-{name}") for name, path in adapters.items()}
    again = compile_engine(directory, tmp_path / "f.plan", adapter=moved, rotate="none")
    assert again.sha256 == report.sha256


# What cannot be switched


@pytest.mark.parametrize("merge", ["fold", "zero-point"])
def test_names_are_for_branches(merge: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    with pytest.raises(SchemeError, match=f"--merge {merge} for adapters with names") as error:
        compile_engine(directory, tmp_path / "e.plan", adapter={"poet": tmp_path / "poet"}, merge=merge)
    assert "--merge branch" in error.value.hint


def test_what_changes_the_shared_weights_cannot_be_switched(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    plain = save_peft(directory, tmp_path / "plain")

    def refused(path: Path, told: str, error: type[Exception] = SchemeError, **options: Any) -> None:
        with pytest.raises(error, match=told):
            compile_engine(
                directory, tmp_path / "e.plan", adapter={"plain": plain, "other": path}, rotate="none", **options
            )

    dora = save_peft(directory, tmp_path / "dora", use_dora=True)
    refused(dora, r"other \(.*dora\) is a DoRA, whose magnitudes scale the rows of .* that all share")
    head = save_peft(directory, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    refused(head, r"other \(.*head\) has a part for lm_head.weight, which can only be folded, for good")
    residual = {name: replace(delta, scale=1.0) for name, delta in random_deltas(directory, rank=2).items()}
    basis = basis_of(directory, "none", **W4, residual=True)
    write_adapter(tmp_path / "loftq", random_deltas(directory), basis, residual=residual)
    refused(tmp_path / "loftq", "loftq repairs the rounding of a base of its own")
    refused(plain.parent / "nowhere", "is not an adapter directory", InputError)
    assert not list(tmp_path.glob("*.plan*"))


def test_a_router_cannot_be_switched(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("qwen3-moe")
    write_adapter(tmp_path / "a", random_deltas(directory, routers=True), basis_of(directory, "r1,r4"))
    with pytest.raises(SchemeError, match=r"mlp\.gate.*only be folded"):
        compile_engine(directory, tmp_path / "e.plan", adapter={"a": tmp_path / "a"})


def test_tokens_of_all_rows_at_once_cannot_be_gated_by_row() -> None:
    x = ir.Value(name="x", shape=ir.Shape([None, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    ids = ir.Value(name="input_ids", shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))
    a = ir.Value(name="a", shape=ir.Shape([8, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("MatMul", [x, a], name="w/branch/a/MatMul", metadata_props={BRANCH_A: "w"})
    model = ir.Model(ir.Graph([ids, x, a], node.outputs, nodes=[node], opset_imports={"": 24}), ir_version=10)
    with pytest.raises(UnsupportedModelError, match="cannot be switched by row"):
        SwitchBranches(("one",), {"w": [0] * 4})(model)


def test_the_command_line(tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = talking(tiny_model("llama16"), tmp_path / "model")
    adapters = adapters_of(directory, tmp_path, size=0.5)
    flags = [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]
    engine = str(tmp_path / "e.plan")
    assert main(["compile", str(directory), "-o", engine, "--scheme", "fp32", *flags]) == 0
    capsys.readouterr()
    said = {}
    for name, given in (("", []), *((name, ["--adapter", name]) for name in adapters)):
        assert main(["run", engine, "-p", "Hello there", "--max-new-tokens", "12", *given]) == 0
        said[name] = capsys.readouterr().out
    assert len(set(said.values())) == 3
    assert main(["run", engine, "-p", "Hello", "--adapter", "baker"]) == 2
    told = capsys.readouterr().err
    assert "no adapter 'baker'" in told
    assert "it has poet, clerk" in told
    merged = save_merged(directory, adapters["poet"], tmp_path / "merged")
    assert main(["compile", str(merged), "-o", engine, "--scheme", "fp32"]) == 0
    capsys.readouterr()
    assert main(["run", engine, "-p", "Hello there", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == said["poet"]
    assert main(["run", engine, "-p", "Hello", "--adapter", "poet"]) == 2
    assert "nothing in it can be switched" in capsys.readouterr().err
