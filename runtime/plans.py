"""TensorRT plans inside an engine: adding them to one that has its ONNX part."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rqc.runtime.container import EngineFile
from rqc.runtime.engine_writer import Append, EngineSummary, Weights, write_parts
from rqc.runtime.zip_layout import GRAPH, MANIFEST, WEIGHTS


@dataclass(frozen=True, eq=False)
class BuiltPlan:
    """A serialized plan and what the manifest says of it."""

    record: Mapping[str, Any]
    data: memoryview

    @property
    def entry(self) -> str:
        """Its name in the engine."""
        return str(self.record["entry"])


def with_plans(
    engine: EngineFile, path: str | os.PathLike[str], plans: Sequence[BuiltPlan], target: str | None = None
) -> EngineSummary:
    """Write `engine` with `plans` at `path`, which may be its own; plans of the same name are replaced.

    target: what the manifest names as the target from then on, if it changes. Raises as `write_parts` does.
    """
    new = {plan.entry for plan in plans}
    kept = [record for record in engine.manifest.get("plans") or [] if record["entry"] not in new]
    records = sorted([*kept, *(dict(plan.record) for plan in plans)], key=lambda record: str(record["name"]))
    manifest = {key: value for key, value in engine.manifest.items() if key != "entries"}
    manifest |= {"plans": records} | ({} if target is None else {"target": target})
    names = [name for name in engine.names() if name not in (MANIFEST, GRAPH, WEIGHTS) and name not in new]
    files: dict[str, bytes | memoryview] = {name: engine.read(name) for name in names}
    files |= {plan.entry: plan.data for plan in plans}

    def stream(append: Append) -> None:
        for chunk in engine.chunks(WEIGHTS):
            append(memoryview(chunk))

    return write_parts(path, manifest, engine.relocatable_graph(), Weights(engine.size_of(WEIGHTS), stream), files)
