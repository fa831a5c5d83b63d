"""Embedding and head are stored as wide as was asked for, or the compile says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import TinyModel

from rqc.compiler.api import compile_engine
from rqc.compiler.verify.engine import verify_engine
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import SchemeError

IDS = [3 + (7 * i) % 90 for i in range(64)]


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        ("llama-tied", {"scheme": "w4a16", "embedding_bits": 16}, (16, 16)),
        ("gemma", {"scheme": "w4a8", "head_bits": 16, "rotate": "r1,r4"}, (16, 16)),
        ("llama16", {"scheme": "w4a16", "embedding_bits": 16, "head_bits": 4}, (16, 4)),
        ("llama16", {"scheme": "w4a8", "embedding_bits": 32, "head_bits": 16, "rotate": "r1,r4"}, (32, 16)),
        ("llama-tied", {"scheme": "fp16", "embedding_bits": 32}, (32, 32)),
        ("llama16", {"scheme": "fp16", "head_bits": 32, "rotate": "r1"}, (16, 32)),
        ("llama16", {"scheme": "fp32", "head_bits": 32}, (32, 32)),
    ],
)
def test_tables_have_the_width_asked_for(
    name: str, options: dict[str, Any], bits: tuple[int, int], tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory, engine = tiny_model(name), tmp_path / "engine.plan"
    compile_engine(directory, engine, **{"rotate": "none", **options})
    with EngineFile.open(engine) as file:
        stored = {row["name"]: row["bits"] for row in file.manifest["layers"] if "bits" in row}
        assert (file.manifest["embedding_bits"], file.manifest["head_bits"]) == bits
    assert (stored["model.embed_tokens.weight"], stored["lm_head.weight"]) == bits
    assert verify_engine(engine, directory, token_ids=IDS, tokens=64).passed


@pytest.mark.parametrize(
    ("scheme", "option", "bits"),
    [("fp32", "embedding_bits", 8), ("fp32", "head_bits", 16), ("fp16", "embedding_bits", 4), ("fp16", "head_bits", 8)],
)
def test_a_width_that_a_float_scheme_does_not_have_is_refused(
    scheme: str, option: str, bits: int, tiny_model: TinyModel, tmp_path: Path
) -> None:
    with pytest.raises(SchemeError, match=f"{bits} bits with --scheme {scheme}"):
        compile_engine(tiny_model("llama16"), tmp_path / "e.plan", scheme=scheme, rotate="none", **{option: bits})
    assert not list(tmp_path.iterdir())


def test_a_hidden_size_without_a_block(tiny_model: TinyModel, tmp_path: Path) -> None:
    """By default such tables stay in float, and the manifest says so; asked for in 8 bits, they are refused."""
    directory, engine = tiny_model("llama", hidden_size=90, head_dim=10), tmp_path / "engine.plan"
    compile_engine(directory, engine, scheme="w4a16", rotate="none")
    with EngineFile.open(engine) as file:
        assert (file.manifest["embedding_bits"], file.manifest["head_bits"]) == (32, 32)
    with pytest.raises(SchemeError, match="divides the hidden size 90"):
        compile_engine(directory, engine, scheme="w4a16", rotate="none", embedding_bits=8)


def test_a_hidden_size_without_a_block_on_tensorrt(tiny_model: TinyModel, tmp_path: Path) -> None:
    """8 bits have one scale per row there; 4 bits have blocks, and are refused rather than left in float."""
    directory, engine = tiny_model("llama", hidden_size=90, head_dim=10), tmp_path / "engine.plan"
    options = {"scheme": "w4a16", "rotate": "none", "target": "tensorrt-rtx", "portable": True}
    with pytest.raises(SchemeError, match="4 bits: no block divides the hidden size 90") as error:
        compile_engine(directory, engine, **options, embedding_bits=4)
    assert error.value.hint == "--embedding-bits and --head-bits 8 or 16"
    compile_engine(directory, engine, **options)
    with EngineFile.open(engine) as file:
        assert (file.manifest["embedding_bits"], file.manifest["head_bits"]) == (8, 8)
