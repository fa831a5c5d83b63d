"""A compile as a whole: the same file each time, instruments, dry runs, memory limits, frames chosen by measurement."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from tiny import TinyModel, give_voice

from rqc.compiler.api import compile_engine
from rqc.compiler.calibration.blocks import partition, perplexity
from rqc.compiler.importer import import_model
from rqc.compiler.probe import run_session, run_stage
from rqc.models.checkpoint import Checkpoint
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import InputError, ResourceError, RotationError, SchemeError


class Lines:
    """Progress as a list."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.shares: list[float] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, label: str, done: int, total: int) -> None:
        self.shares.append(done / total)


@pytest.fixture
def talking_model(tiny_model: TinyModel) -> Path:
    """A tiny model with a tokenizer of single characters."""
    return give_voice(tiny_model("llama16", rms_norm_eps=1e-5))


def test_same_inputs_same_bytes_whatever_the_threads(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("qwen2")
    digests = set()
    for threads in ("1", "2"):
        path = tmp_path / f"engine-{threads}.plan"
        code = f"import rqc; rqc.compile({str(directory)!r}, {str(path)!r}, rotate='r1,r2,r4')"
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, stderr=subprocess.DEVNULL)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    other = compile_engine(directory, tmp_path / "other.plan", rotate="r1,r2,r4", rotation_seed=1)
    assert len(digests) == 1
    assert other.sha256 not in digests


def test_a_dry_run_reads_no_weight_and_writes_nothing(
    talking_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    before = sorted(tmp_path.iterdir())
    report = compile_engine(talking_model, None, dry_run=True)
    value = report.to_json()
    assert value["engine"] is None
    assert value["estimate"]["parameters"] == sum(
        int(np.prod(info.shape)) for info in Checkpoint.open(talking_model).tensors.values()
    )
    assert {"Rotate", "PackBlocks"} - {item["name"] for item in value["passes"]} == {"Rotate"}
    assert next(item["detail"] for item in value["passes"] if item["name"] == "QuantizeLinears").startswith("4 bit")
    assert sorted(tmp_path.iterdir()) == before


def test_the_estimate_of_a_dry_run_is_close(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16", hidden_size=192, intermediate_size=2048)
    estimated = compile_engine(directory, None, dry_run=True, rotate="r1").to_json()["estimate"]["size_bytes"]
    size = compile_engine(directory, tmp_path / "e.plan", rotate="r1").size_bytes
    assert abs(estimated - size) < 200_000  # the graph itself, and the gaps that alignment leaves


def test_a_dry_run_refuses_what_reads_weights(tiny_model: TinyModel, tmp_path: Path) -> None:
    for option in ({"verify_each": True}, {"dump_ir": tmp_path / "ir"}):
        with pytest.raises(InputError, match="dry run"):
            compile_engine(tiny_model("llama16"), None, dry_run=True, **option)


def test_max_memory_fails_before_a_weight_is_read(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(ResourceError, match="--max-memory"):
        compile_engine(tiny_model("llama16"), tmp_path / "e.plan", rotate="r1", max_memory="64MiB")
    assert not list(tmp_path.iterdir())


def test_every_dumped_stage_runs(tiny_model: TinyModel, tmp_path: Path) -> None:
    compile_engine(tiny_model("gemma"), tmp_path / "e.plan", rotate="r1,r2,r4", scheme="w4a16", dump_ir=tmp_path / "ir")
    stages = sorted((tmp_path / "ir").glob("*.onnx"))
    ids = np.arange(20, dtype=np.int64)
    logits = [run_session(ort.InferenceSession(stage), ids) for stage in stages]
    assert len(stages) >= 10
    assert stages[0].name == "00-import.onnx"
    assert all(np.isfinite(value).all() for value in logits)
    np.testing.assert_allclose(logits[0], logits[2], atol=1e-5)


def test_auto_takes_the_frame_that_measures_better(talking_model: Path, tmp_path: Path) -> None:
    progress = Lines()
    report = compile_engine(talking_model, tmp_path / "e.plan", scheme="w4a4", group_size=-1, progress=progress)
    scores = report.rotation["scores"]
    assert set(scores) == {"none", "r1,r2,r4"}
    better = "r1,r2,r4" if scores["r1,r2,r4"] <= 1.01 * scores["none"] else "none"
    assert report.rotation["chosen"] == better
    assert any(line.startswith("rotate auto") and "perplexity" in line for line in progress.lines)
    assert progress.shares[-1] == 1.0
    stored = json.loads(EngineFile.open(tmp_path / "e.plan").read("report.json"))
    assert stored["rotation"] == report.rotation


def test_auto_says_when_it_cannot_measure(tiny_model: TinyModel, tmp_path: Path) -> None:
    for scheme, chosen in (("w4a8", "none"), ("w4a4", "r1,r2,r4")):
        report = compile_engine(tiny_model("llama3-rope"), tmp_path / "e.plan", scheme=scheme)
        assert report.rotation == {"chosen": chosen, "scores": None}


def test_block_by_block_equals_the_whole_graph(tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model("gemma3"))
    ids = np.random.default_rng(0).integers(0, 96, (2, 70))
    total = 0.0
    for row in ids:
        logits = run_stage(imported.model, row)[:-1].astype(np.float64)
        chosen = logits[np.arange(69), row[1:]]
        total += float((np.log(np.exp(logits).sum(-1)) - chosen).sum())
    assert len(partition(imported.model)) == 4
    assert perplexity(imported.model, ids) == pytest.approx(np.exp(total / (2 * 69)), rel=1e-5)


def test_refusals_name_the_way_out(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(RotationError) as rotation:
        compile_engine(tiny_model("gemma2"), tmp_path / "e.plan", rotate="r1,r4")
    assert "r2,r3,r4" in rotation.value.hint
    with pytest.raises(SchemeError):
        compile_engine(tiny_model("llama-tied"), tmp_path / "e.plan", embedding_bits=4, head_bits=8)
    assert not list(tmp_path.iterdir())
