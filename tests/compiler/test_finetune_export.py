"""`--export-plain`: never into the adapter itself, and of a finished adapter too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import TinyModel, give_voice

import rqc
from rqc.compiler.finetune.train import AdapterTrainer
from rqc.runtime.errors import InputError

QUICK: dict[str, Any] = {"rank": 2, "max_steps": 2, "batch_size": 4, "seq_len": 64, "lr": 1e-2}


@pytest.fixture
def model(tiny_model: TinyModel) -> Path:
    return give_voice(tiny_model("phi3"))


@pytest.mark.parametrize("place", ["adapter", "other/../adapter", "adapter/checkpoints", "adapter/checkpoints/plain"])
def test_an_export_does_not_replace_its_adapter(place: str, model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is where the adapter itself is written"):
        rqc.finetune(model, data, tmp_path / "adapter", **QUICK, export_plain=tmp_path / place)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{}, {"base": "w2", "init": "loftq"}, {"adapter_type": "dora", "rotate": "r4"}])
def test_a_finished_adapter_is_exported_as_it_would_have_been(
    options: dict[str, Any], model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = rqc.finetune(model, data, tmp_path / "one", **QUICK, **options, export_plain=tmp_path / "at_once")
    assert at_once.plain == str(tmp_path / "at_once")
    monkeypatch.setattr(AdapterTrainer, "train", lambda *_: pytest.fail("trained again"))
    later = rqc.finetune(
        model, data, tmp_path / "one", **QUICK, **options, export_plain=tmp_path / "later", resume=True
    )
    assert later.plain == str(tmp_path / "later")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "later" / name).read_bytes() == (tmp_path / "at_once" / name).read_bytes()
    assert {path.name for path in (tmp_path / "later").iterdir()} == {
        path.name for path in (tmp_path / "at_once").iterdir()
    }


def test_a_path_without_a_file_is_told_as_such(model: Path, tmp_path: Path) -> None:
    for name, told in (("nowhere", "No such file"), ("nowhere.csv", "No such file"), ("", "Is a directory")):
        with pytest.raises(InputError, match=told):
            rqc.finetune(model, tmp_path / name, tmp_path / "adapter", **QUICK)
