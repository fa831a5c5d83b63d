"""Chat templates that tell the model the date, as Llama 3.2's does: a run that takes two days has one."""

from __future__ import annotations

import json
import shutil
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from tiny import TinyModel, give_voice

import rqc
from rqc.compiler.finetune import run
from rqc.compiler.finetune.data import read_training_tokenizer
from rqc.compiler.finetune.train import AdapterTrainer
from rqc.runtime.errors import InputError

MARKED = "{% generation %}{{ message.content }}{% endgeneration %}"
DATED = (
    "Today: {{ strftime_now(format='%d %b %Y') }};{% for message in messages %}{% if message.role == 'user' %}"
    "?{{ message.content }}!{% else %}ANSWER{% endif %}{% endfor %}"
)
QUICK: dict[str, Any] = {"rank": 2, "max_steps": 2, "batch_size": 2, "save_steps": 1, "lr": 1e-2}


class OnDay(date):
    """A calendar that stands still."""

    day_of_tests = date(2026, 3, 1)

    @classmethod
    def today(cls) -> date:
        return cls.day_of_tests


@pytest.fixture(params=["{{ message.content }}", MARKED], ids=["plain", "marked"])
def model(request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path: Path) -> Path:
    shutil.copytree(give_voice(tiny_model("llama16")), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(DATED.replace("ANSWER", request.param))
    return tmp_path / "model"


def test_a_run_goes_on_the_day_after(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, adapter = tmp_path / "data.jsonl", tmp_path / "adapter"
    talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    data.write_text("".join(json.dumps({"messages": [*talk * n]}) + "\n" for n in (1, 2, 3)))
    monkeypatch.setattr(run, "date", OnDay)
    step = AdapterTrainer.training_step
    with monkeypatch.context() as patch:

        def second_fails(self: AdapterTrainer, *arguments: Any, **options: Any) -> Any:
            if self.state.global_step:
                raise KeyboardInterrupt
            return step(self, *arguments, **options)

        patch.setattr(AdapterTrainer, "training_step", second_fails)
        with pytest.raises(KeyboardInterrupt):
            rqc.finetune(model, data, adapter, **QUICK)
    monkeypatch.setattr(OnDay, "day_of_tests", date(2026, 3, 2))
    assert rqc.finetune(model, data, adapter, **QUICK, resume=True).steps == 2
    assert json.loads((adapter / "training.json").read_text())["run"]["day"] == "2026-03-01"
    assert rqc.finetune(model, data, adapter, **QUICK, resume=True).steps == 2
    (adapter / "training.json").write_text("{}")
    with pytest.raises(InputError, match=r"training.json is damaged"):
        rqc.finetune(model, data, adapter, **QUICK, resume=True)


def test_the_day_is_in_the_prompt(model: Path) -> None:
    tokenizer = read_training_tokenizer(model, datetime(2024, 7, 26))
    talk = [{"role": "user", "content": "Hi"}]
    assert tokenizer.chat_text(talk, None, prompt=True) == "Today: 26 Jul 2024;?Hi!"
