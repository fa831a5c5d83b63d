"""`rqc rotate` on tiny models: the loss falls, a killed run goes on to the same file, what has no sense is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TinyModel, give_voice

import rqc
from rqc.compiler.cli import main
from rqc.compiler.rotate.run import roundings
from rqc.compiler.rotate.settings import RotateSettings
from rqc.compiler.rotate.state import State
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.models.rotation_file import RotationFile
from rqc.models.token_grid import TokenGrid
from rqc.runtime.errors import InputError, RotationError, RqcError, SchemeError

QUICK: dict[str, Any] = {"steps": 6, "seq_len": 32, "save_steps": 2}


class Killed(BaseException):
    """A kill that leaves no time to tidy up, as far as files go."""


class KillsAfter:
    """Progress that ends the run after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def line(self, text: str) -> None:
        pass

    def advance(self, label: str, done: int, total: int) -> None:
        if done > self.steps:
            raise Killed


@pytest.fixture
def model(tiny_model: TinyModel) -> Path:
    return give_voice(tiny_model("llama-tied", initializer_range=0.1))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A rotation moves the outliers of a few channels into all of them. " * 4, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama-tied", {}),
        ("llama-tied", {"loss": "ce"}),
        ("phi3", {"weights": "rtn", "activation_symmetric": False, "activation_clip": 0.95}),
        ("qwen3-moe", {"rotate": "r1", "batch_size": 2, "gradient_checkpointing": True}),
        ("gemma2", {"rotate": "r2,r3", "kv_cache": "int4", "scheme": "w4a16"}),
        ("llama-bias", {"scheme": "w2a16", "weights": "rtn", "hadamard": "block"}),
    ],
    ids=str,
)
def test_the_loss_falls(
    family: str, options: dict[str, Any], tiny_model: TinyModel, text: Path, tmp_path: Path
) -> None:
    """On the one window that it is learned on, so that nothing but the descent decides."""
    directory = give_voice(tiny_model(family, initializer_range=0.1))
    path = tmp_path / "r.safetensors"
    report = rqc.rotate(directory, path, calibration=text, steps=25, seq_len=256, lr=0.5, **options)
    before, after = report.held_out
    description = Reference.load(directory).description
    floor = _loss_in_floats(directory, text) if report.loss == "ce" else 0
    assert after < before - 0.1 * abs(before - floor)
    assert report.losses[0] == pytest.approx(before, abs=0.05)
    file = RotationFile.read(path)
    learned = file.rotation.learned
    assert learned is not None
    assert learned.sites == file.rotation.sites & {"r1", "r2"}
    learned.check({"r1": (1, description.architecture.hidden_size), "r2": (2, description.architecture.head_dim)})
    assert file.rotation.seed == 0


@pytest.mark.parametrize(("family", "centred"), [("llama-tied", True), ("gemma2", False)])
def test_a_cache_is_rounded_as_the_engine_keeps_it(family: str, centred: bool, tiny_model: TinyModel) -> None:
    """Per token and 32 channels; keys less their mean, but where a softcap would see it."""
    settings = RotateSettings.from_values({"scheme": "w4a16", "rotate": "r2,r3", "kv_cache": "int4"})
    made = roundings(settings, Reference.load(tiny_model(family)))
    assert made.cache is not None
    assert made.centred == centred
    x = np.random.default_rng(0).normal(size=(1, 2, 5, 64)).astype(np.float32) * np.arange(64, dtype=np.float32)
    found = made.cache(torch.from_numpy(x)).numpy()
    for group in (slice(0, 32), slice(32, 64)):
        np.testing.assert_allclose(found[..., group], TokenGrid(4, False).round(x[..., group]), rtol=1e-6)


def test_nothing_is_learned_for_a_file_that_cannot_be_written(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        rqc.rotate(model, tmp_path / "nowhere" / "r.st", calibration=text, progress=KillsAfter(-1), **QUICK)


def test_an_empty_text_is_named(model: Path, tmp_path: Path) -> None:
    (empty := tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"empty\.txt: no text in the file"):
        rqc.rotate(model, tmp_path / "r.st", calibration=empty, **QUICK)


def _loss_in_floats(directory: Path, text: Path) -> float:
    from rqc.compiler.text import read_tokenizer

    tokenizer = read_tokenizer(directory)
    assert tokenizer is not None
    ids = np.asarray(tokenizer.encode(text.read_text()).ids[:256], np.int64)
    logits = Reference.load(directory).logits(ids).astype(np.float64)[:-1]
    logits -= logits.max(-1, keepdims=True)
    return float((np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), ids[1:]]).mean())


def test_a_killed_run_goes_on_to_the_same_file(model: Path, text: Path, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.safetensors", tmp_path / "r.safetensors"
    expected = rqc.rotate(model, whole, calibration=text, **QUICK)
    with pytest.raises(Killed):
        rqc.rotate(model, path, calibration=text, progress=KillsAfter(4), **QUICK)
    assert not path.exists()
    state = tmp_path / "r.safetensors.training"
    assert state.is_file()
    with pytest.raises(InputError, match="not finished"):
        rqc.rotate(model, path, calibration=text, **QUICK)
    with pytest.raises(InputError, match=r"lr was 0\.2, is 0\.1"):
        rqc.rotate(model, path, calibration=text, resume=True, lr=0.1, **QUICK)
    report = rqc.rotate(model, path, calibration=text, resume=True, **QUICK)
    assert report.losses == expected.losses
    assert path.read_bytes() == whole.read_bytes()
    assert not state.exists()
    before = path.read_bytes()
    again = rqc.rotate(model, path, calibration=text, resume=True, **QUICK)
    assert (again.losses, path.read_bytes()) == (report.losses, before)
    with pytest.raises(InputError, match="another run"):
        rqc.rotate(model, path, calibration=text, resume=True, **{**QUICK, "steps": 3})


def test_a_state_from_a_file_lies_as_a_new_one_does() -> None:
    """Some hundred steps on, the last bits of products would otherwise be another rotation."""
    odd = torch.frombuffer(bytearray(8 * 64), dtype=torch.float64, offset=8, count=16)
    found = State({"r1": odd}, {"r1": odd}).on("cpu")
    assert all(tensor.data_ptr() % 64 == 0 for tensor in (found.matrices["r1"], found.moments["r1"]))


def test_a_damaged_state_and_foreign_files_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    path.with_name("r.safetensors.training").write_bytes(b"half")
    with pytest.raises(InputError, match="damaged"):
        rqc.rotate(model, path, calibration=text, resume=True, **QUICK)
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="is there, and is no rotation"):
        rqc.rotate(model, path, calibration=text, **QUICK)
    assert path.read_bytes() == b"mine"
    with pytest.raises(InputError) as caught:
        rqc.rotate(model, tmp_path / "nowhere" / "r.safetensors", calibration=text, **QUICK)
    assert ".training" not in str(caught.value)


def test_the_seed_orders_the_text(model: Path, tmp_path: Path) -> None:
    """Every window once before any comes twice."""
    long = tmp_path / "long.txt"
    long.write_text("".join(chr(33 + place % 90) for place in range(20 * 32)), encoding="utf-8")
    losses = [
        rqc.rotate(model, tmp_path / f"{seed}.st", calibration=long, seed=seed, **QUICK).losses for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


REFUSED: dict[str, tuple[dict[str, Any], type[RqcError], str]] = {
    "nothing rounded": ({"scheme": "w4a16"}, SchemeError, "--weights rtn"),
    "floats": ({"scheme": "fp16"}, SchemeError, "--weights rtn"),
    "rtn of floats": ({"scheme": "fp32", "weights": "rtn"}, SchemeError, "--scheme w4a4"),
    "nothing to learn": ({"rotate": "r3,r4"}, RotationError, "--rotate r1,r2,r4"),
    "kernel's grid": ({"scheme": "w4a8", "activation_symmetric": False}, SchemeError, "w6a6"),
    "steps": ({"steps": 0}, InputError, "steps is 1 or more"),
    "lr": ({"lr": float("nan")}, InputError, "0.2"),
    "group": ({"group_size": 64}, SchemeError, "--weights rtn"),
    "asymmetric": ({"scheme": "w4a8", "symmetric": False}, SchemeError, "--weights rtn"),
    "turn": ({"lr": 1.5}, InputError, "up to 1"),
    "momentum": ({"momentum": 1.0}, InputError, "0.9"),
    "clip": ({"activation_clip": 0.0}, InputError, "above 0"),
    "typo": ({"stesp": 5}, InputError, "steps"),
    "type": ({"steps": "many"}, InputError, "whole number"),
    "loss": ({"loss": "mse"}, InputError, "kl, ce"),
    "device": ({"device": "tpu"}, InputError, "cpu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str) -> None:
    options, error, way_out = REFUSED[case]
    with pytest.raises(error) as caught:
        RotateSettings.from_values(options)
    assert way_out in caught.value.hint


def test_families_that_refuse_r1_say_so(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(RotationError, match="r1 cannot be folded into gemma2"):
        rqc.rotate(give_voice(tiny_model("gemma2")), tmp_path / "r.st")


def test_the_command_line(model: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--steps", "2", "--seq-len", "32", "--calibration", str(text), "--json"]
    assert main(["rotate", str(model), "-o", str(tmp_path / "r.st"), *flags]) == 0
    said = json.loads(capfd.readouterr().out)
    assert (said["steps"], len(said["losses"]), said["sites"]) == (2, 2, "r1,r2,r4")
    assert main(["rotate", str(model), "-o", str(tmp_path / "s.st"), "--scheme", "w4a16", "--json"]) == 2
    assert json.loads(capfd.readouterr().out)["error"]["type"] == "SchemeError"


def test_bf16_learns_too(model: Path, text: Path, tmp_path: Path) -> None:
    report = rqc.rotate(model, tmp_path / "r.st", calibration=text, steps=10, seq_len=256, lr=0.5, dtype="bf16")
    assert report.held_out[1] < report.held_out[0]
    assert RotationFile.read(tmp_path / "r.st").rotation.sites == Rotation.parse("r1,r2,r4").sites
