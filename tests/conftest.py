"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored, and its children


def pytest_collection_finish() -> None:
    """Let collections of garbage pass over all that is imported by now: Trainer asks for one in every run."""
    gc.freeze()


@pytest.fixture(scope="session")
def skeletons() -> Iterator[None]:
    """Let the importer build the graph of a config once per session: most of what a tiny import takes."""
    from rqc.compiler import importer

    build, built = importer._skeleton, {}

    def once(config: Any) -> Any:
        key = config.to_json_string(use_diff=False)
        if key not in built:
            built[key] = build(config)
        return built[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importer, "_skeleton", once)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, skeletons: None) -> Callable[..., Path]:
    """tiny_model(name, **config changes) → the directory of a tiny random model (tests/tiny.py), made once per
    session."""
    from tiny import save_tiny

    made: dict[str, Path] = {}

    def make(name: str, **changes: object) -> Path:
        key = name + repr(sorted(changes.items()))
        if key not in made:
            made[key] = save_tiny(name, tmp_path_factory.mktemp(name), **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 records to fine-tune on."""
    from finetuning import write_records

    return write_records(tmp_path_factory.mktemp("data") / "records.jsonl", 24)


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Path:
    """A tiny Llama to fine-tune."""
    from tiny import give_voice

    return give_voice(tiny_model("llama16"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory RQC_MODEL, or SmolLM2 off its grid, from tools/fetch_model's cache; nothing is downloaded."""
    if "RQC_MODEL" in os.environ:
        return Path(os.environ["RQC_MODEL"])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rqc" / "models"
    if not list(cache.glob("*.gguf")):
        pytest.skip("no RQC_MODEL, and no model in the cache: tools/fetch_model smollm2 DIR --off-grid writes one")
    directory = tmp_path_factory.mktemp("model") / "smollm2"
    tool = Path(__file__).parents[1] / "tools" / "fetch_model"
    subprocess.run([sys.executable, tool, "smollm2", directory, "--off-grid"], check=True, capture_output=True)
    return directory
