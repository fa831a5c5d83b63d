"""--rotate auto."""

from __future__ import annotations

from typing import Any

from rqc.compiler.importer import Imported
from rqc.compiler.recipe import Recipe
from rqc.models.rotation import Rotation


def score_frames(recipe: Recipe, imported: Imported) -> tuple[Rotation, dict[str, Any]]:
    rotation = Rotation.parse("r1,r2,r4")
    return rotation, {"chosen": str(rotation), "scores": None}
