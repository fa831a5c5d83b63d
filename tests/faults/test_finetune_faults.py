"""Fine-tunes that end before their time, and those that must not start."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetuning import write_records
from safetensors.numpy import load_file
from tiny import TinyModel, give_voice

import rqc
from rqc.compiler.finetune.checkpoints import Run
from rqc.compiler.finetune.train import AdapterTrainer
from rqc.runtime.errors import (
    BasisMismatchError,
    InputError,
    ResourceError,
    RotationError,
    RqcError,
    SchemeError,
    TrainingError,
)

STEPS = 8
QUICK: dict[str, Any] = {
    "rank": 4,
    "max_steps": STEPS,
    "batch_size": 4,
    "seq_len": 64,
    "lr": 1e-2,
    "dropout": 0.1,
    "eval_split": 4,
    "eval_steps": 3,
    "save_steps": 2,
}
# Runs the fine-tunes that it reads, one JSON object a line, each in a fork of itself: imports take longer than they do.
SERVER = """
import gc, json, os, signal, sys
import torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama  # lazy otherwise: in every fork anew
from rqc.compiler.finetune import train
from rqc.compiler.finetune.run import finetune
gc.freeze()

PLACES = {
    "step": (train.AdapterTrainer, "training_step"),
    "weights": (train, "save_file"),  # in the middle of a checkpoint
    "optimizer": (torch, "save"),
    "rename": (os, "rename"),
    "sync": (os, "fsync"),
}

def arm(where, nth):
    home, name = PLACES[where]
    call, calls = getattr(home, name), []
    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    setattr(home, name, dying)

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        if asked["kill"]:
            arm(*asked["kill"])
        finetune(**asked["arguments"])
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def whole(tiny_model: TinyModel, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run leaves."""
    output = tmp_path_factory.mktemp("whole") / "adapter"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rqc.finetune(give_voice(tiny_model("llama16")), data, output, **QUICK)
    torch.set_num_threads(threads)
    return output


def log_of(directory: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((directory / "training.json").read_text())["log"]
    return found


def assert_same(directory: Path, other: Path) -> None:
    """The same adapter and the same curves."""
    one, two = (load_file(path / "adapter_model.safetensors") for path in (directory, other))
    assert one.keys() == two.keys()
    assert max(float(np.abs(one[name] - two[name]).max()) for name in one) <= 1e-6
    curve, expected = log_of(directory), log_of(other)
    assert [entry.keys() for entry in curve] == [entry.keys() for entry in expected]
    for found, wanted in zip(curve, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert sorted(path.name for path in directory.iterdir()) == sorted(path.name for path in other.iterdir())


# Of 8 steps with a checkpoint after every second: the first batch, the sixth; the first checkpoint's parameters and the
# second's optimizer; the third's name, the removal of the oldest, of all; the adapter's files and training.json.
KILLS = [
    *(("step", 1), ("step", 6), ("weights", 1), ("optimizer", 6)),
    *(("rename", 3), ("rename", 4), ("rename", 7), ("sync", 31), ("sync", 34)),
]


@pytest.fixture(scope="module")
def run_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
    """run_one(arguments, kill) → the exit code of a fine-tune that dies at the nth call of a function."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(arguments: dict[str, Any], kill: tuple[str, int] | None = None) -> int:
            print(json.dumps({"arguments": arguments, "kill": kill}), file=server.stdin, flush=True)
            return int(server.stdout.readline())

        yield run
        server.stdin.close()


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: f"{kill[0]}-{kill[1]}")
def test_a_kill_costs_nothing_but_time(
    kill: tuple[str, int], run_one: Callable[..., int], model: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    arguments = {"model_dir": str(model), "data": str(data), "output": str(output), **QUICK}
    assert run_one(arguments, kill) == -signal.SIGKILL
    assert run_one({**arguments, "resume": True}) == 0
    assert_same(output, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def train(model: Path, data: Path, output: Path, **changes: Any) -> rqc.compiler.finetune.report.FinetuneReport:
    return rqc.finetune(model, data, output, **{**QUICK, **changes})


def interrupted(model: Path, data: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """A run that ends in the middle of its sixth step."""
    with monkeypatch.context() as patch:
        calls: list[int] = []
        plain = AdapterTrainer.training_step

        def stop(self: AdapterTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return plain(self, *arguments, **options)

        patch.setattr(AdapterTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(model, data, output, **changes)


@pytest.mark.parametrize(
    "options",
    [
        {"base": "w4", "init": "loftq", "activations": 8},
        {"adapter_type": "dora", "init": "pissa", "optimizer": "lora-plus"},
        {"adapter_type": "qalora", "optimizer": "lora-fa", "grad_accum": 2, "batch_size": 2},
        {"adapter_type": "dora", "optimizer": "lora-rite", "max_grad_norm": 0.1},
        {"adapter_type": "qalora", "optimizer": "lora-rite", "dtype": "bf16"},
        {"dtype": "bf16", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_an_interrupted_run_goes_on(
    options: dict[str, Any], model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(model, data, tmp_path / "whole", **options)
    interrupted(model, data, tmp_path / "adapter", monkeypatch, **options)
    train(model, data, tmp_path / "adapter", **options, resume=True)
    assert_same(tmp_path / "adapter", tmp_path / "whole")


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_loss_that_is_no_number_ends_the_training_and_keeps_the_last_checkpoint(
    poison: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(self: AdapterTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = plain(self, *arguments, **options)
        return loss * float("nan") if self.state.global_step == 4 else loss

    def explode(self: AdapterTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = plain_step(self, *arguments, **options)
        if self.state.global_step == 4:
            next(iter(self.parameters.values())).grad.fill_(float("inf"))  # type: ignore[union-attr]
        return loss

    plain, plain_step = AdapterTrainer.compute_loss, AdapterTrainer.training_step
    if poison == "loss":
        monkeypatch.setattr(AdapterTrainer, "compute_loss", lose)
    else:
        monkeypatch.setattr(AdapterTrainer, "training_step", explode)
    with pytest.raises(TrainingError, match=r"at step 5; step 4 is kept in") as caught:
        train(model, data, tmp_path / "adapter")
    assert caught.value.exit_code == 1
    run = Run(tmp_path / "adapter")
    latest = run.latest()
    assert latest is not None
    assert run.step() == 4
    saved = load_file(latest / "trained.safetensors")
    assert all(np.isfinite(value).all() for value in saved.values())


def test_another_run_is_not_resumed(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel
) -> None:
    output = tmp_path / "adapter"
    interrupted(model, data, output, monkeypatch)
    other = write_records(tmp_path / "other.jsonl", 23)
    changes: list[tuple[str, dict[str, Any]]] = [
        (r"lr was 0.01, is 0.02$", {"lr": 0.02}),
        (r"rank was 4, is 2; rotation_seed was 0, is 1$", {"rank": 2, "rotation_seed": 1}),
        (r"rotate was r1,r4, is none$", {"rotate": "none"}),
    ]
    for told, change in changes:
        with pytest.raises(InputError, match=told):
            train(model, data, output, resume=True, **change)
    with pytest.raises(InputError, match=r"training data was [0-9a-f]{12}, is [0-9a-f]{12}"):
        train(model, other, output, resume=True)
    with pytest.raises(InputError, match=r"model was [0-9a-f]{12}, is [0-9a-f]{12}$"):
        train(give_voice(tiny_model("qwen2")), data, output, resume=True)
    with pytest.raises(InputError, match="stopped after step 4"):
        train(model, data, output)
    assert Run(output).step() == 4
    assert train(model, data, output, resume=True, save_steps=3).steps == STEPS


def test_a_finished_adapter_is_not_trained_again_and_one_of_other_settings_is_no_resumption(
    model: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    monkeypatch.setattr(AdapterTrainer, "train", lambda *_: pytest.fail("trained again"))
    assert train(model, data, whole, resume=True).steps == STEPS
    with pytest.raises(InputError, match="max_steps was 8, is 9"):
        train(model, data, whole, resume=True, max_steps=9)
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


def test_other_directories_are_not_overwritten(model: Path, data: Path, tmp_path: Path, whole: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("thesis", "file"):
        with pytest.raises(InputError, match=name):
            train(model, data, tmp_path / name)
        with pytest.raises(InputError, match=name):
            train(model, data, tmp_path / "new", export_plain=tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    shutil.copytree(whole, tmp_path / "ours")
    assert train(model, data, tmp_path / "ours", max_steps=1).steps == 1
    (tmp_path / "empty").mkdir()
    assert train(model, data, tmp_path / "empty", max_steps=1).steps == 1


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_serves(
    name: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "adapter"
    interrupted(model, data, output, monkeypatch)
    latest = output / "checkpoints" / "checkpoint-4"
    content = (latest / name).read_bytes()
    (latest / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="checkpoint-4 is damaged"):
        train(model, data, output, resume=True)
    shutil.rmtree(latest)
    assert train(model, data, output, resume=True).steps == STEPS


def test_a_place_where_nothing_can_be_written(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no writable folder"):
        train(model, data, tmp_path / "file" / "adapter")


def test_two_at_once_into_one_directory(model: Path, data: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "adapter")
    with run.opened({}, resume=False), pytest.raises(InputError, match="another process"):
        train(model, data, tmp_path / "adapter")


@pytest.mark.parametrize("broken", ["save_file", "torch.save"])
def test_a_full_disk_is_told_in_one_line(
    broken: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """A file on a full disk, as PyTorch and safetensors meet it."""

        def __getattr__(self, name: str) -> Any:
            raise OSError(28, "No space left on device")

    if broken == "save_file":
        monkeypatch.setattr("rqc.compiler.finetune.train.save_file", lambda *_: Full().write)
    else:
        monkeypatch.setattr(torch, "save", lambda *_: Full().write)
    with pytest.raises(ResourceError, match=r"the checkpoint of step 2 cannot be written: No space left on device"):
        train(model, data, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


BAD: list[tuple[type[RqcError], str, dict[str, Any]]] = [
    (
        InputError,
        r"target module 'q_prok' matches no linear.*hint.*did you mean 'q_proj'",
        {"target_modules": "q_prok"},
    ),
    (InputError, "target module 'lm_head' matches no linear", {"target_modules": ["q_proj", "lm_head"]}),
    (InputError, r"rank 33 is larger than model.layers.0.self_attn.k_proj \(32 x 96\)", {"rank": 33}),
    (InputError, "rank 9 is larger than", {"rank": 9, "adapter_type": "qbara"}),
    (SchemeError, "does not divide", {"adapter_type": "qbara", "pool": 5, "rank": 1}),
    (SchemeError, "no multiple of group_size 32", {"adapter_type": "qalora", "pool": 48}),
    (SchemeError, "NF4 has none", {"adapter_type": "qahira", "base": "nf4"}),
    (SchemeError, "group_size is -1", {"adapter_type": "qalora", "group_size": -1}),
    (SchemeError, "group_size 48", {"base": "w4", "group_size": 48}),
    (SchemeError, "no engine has this arithmetic", {"base": "w4", "activations": 6}),
    (SchemeError, "no engine has this arithmetic", {"base": "w2", "activations": 8}),
    (InputError, "loftq on a float base", {"init": "loftq"}),
    (InputError, "off the grid", {"init": "pissa", "base": "w4"}),
    (InputError, "pooled adapter", {"init": "olora", "adapter_type": "qalora"}),
    (InputError, "loftq for dora", {"init": "loftq", "adapter_type": "dora", "base": "w2"}),
    (InputError, "float base", {"init": "eora"}),
    (InputError, "magnitudes", {"init": "eora", "base": "w4", "adapter_type": "dora"}),
    (InputError, "orthogonal with rank 3", {"init": "orthogonal", "rank": 3}),
    (InputError, "qahira has one matrix", {"optimizer": "lora-rite", "adapter_type": "qahira", "base": "w4"}),
    (InputError, "eva: it needs the activations", {"init": "eva"}),
    (InputError, "unknown option 'rnak'.*did you mean 'rank'", {"rnak": 4}),
    (InputError, "batch_size is '4'", {"batch_size": "4"}),
    (InputError, "lr is nan", {"lr": float("nan")}),
    (InputError, r"lr is 1e\+38.*1e\+30 at most", {"lr": 1e38}),
    (InputError, "mica for dora", {"init": "mica", "adapter_type": "dora"}),
    (InputError, "mica with lora-fa: it trains A alone", {"init": "mica", "optimizer": "lora-fa"}),
    (InputError, "mica with lora-rite", {"init": "mica", "optimizer": "lora-rite"}),
    (InputError, "dropout is 1.0", {"dropout": 1.0}),
    (RotationError, "unknown rotation 'r5'", {"rotate": "r5"}),
    (RotationError, "auto", {"rotate": "auto"}),
    (ResourceError, "fp16 on a CPU", {"dtype": "fp16", "device": "cpu"}),
    (BasisMismatchError, "DoRA on", {"adapter_type": "dora", "export_plain": "plain"}),
    (InputError, "eval_split and eval_data", {"eval_data": "records.jsonl"}),
]


@pytest.mark.parametrize(
    ("error", "told", "change"), BAD, ids=lambda each: None if isinstance(each, type) else str(each)
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    error: type[RqcError], told: str, change: dict[str, Any], model: Path, data: Path, tmp_path: Path
) -> None:
    if "export_plain" in change:
        change = {**change, "export_plain": tmp_path / "plain"}
    with pytest.raises(error) as caught:
        train(model, data, tmp_path / "adapter", **change)
    assert re.search(told, f"{caught.value.message} hint: {caught.value.hint}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "no records"),
        ('{"text": "a b c"}\n{oops}\n', "line 2"),
        ('{"instruction": "a", "output": "b"}\n', "no answer token"),
    ],
)
def test_bad_data(content: str, told: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=told):
        train(model, path, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_site_that_the_family_refuses(tiny_model: TinyModel, data: Path, tmp_path: Path) -> None:
    with pytest.raises(RotationError, match="r1 cannot be folded into gemma2"):
        train(give_voice(tiny_model("gemma2")), data, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
