"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
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
