"""What stands against a GPTQ checkpoint of an engine, and how to compile one of which there can be one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rqc.compiler.adapters.merge import FOLD
from rqc.compiler.export.from_model import FOLDING, check_family
from rqc.compiler.export.layout import BITS, misfit
from rqc.compiler.scheme import Scheme
from rqc.models.description import Description
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import InputError, SchemeError

CONFIG = "config.json"


def check_engine(file: EngineFile, description: Description) -> None:
    """Raise an RqcError listing everything in an engine that the format cannot hold, with the flags of one without."""
    check_family(description)
    found = list(_obstacles(file.manifest, description))
    if found:
        raise SchemeError(
            f"{file.path} is more than a GPTQ checkpoint holds: {'; '.join(said for said, _ in found)}",
            hint=f"compile it {', '.join(dict.fromkeys(way for _, way in found if way))}; or rqc export MODEL_DIR",
        )


def check_config(file: EngineFile) -> None:
    """Raise InputError for an engine that does not hold the model's settings."""
    if not file.has(CONFIG):
        raise InputError(f"{file.path} holds no {CONFIG}", hint="rqc export MODEL_DIR, which has one")


def _obstacles(manifest: Mapping[str, Any], description: Description) -> Iterator[tuple[str, str]]:
    """(what stands against it, how to compile without)."""
    widths = {row["name"]: row.get("bits") for row in manifest["layers"]}
    linears = {name: bits for name, bits in widths.items() if name.split("+")[0] in description.by_weight}
    other = next((name for name, bits in linears.items() if bits != BITS), None)
    scheme = Scheme.parse(manifest["scheme"])
    if scheme.small_floats:
        yield f"its weights are floats ({scheme})", "with --scheme w4a16"
    elif other is not None:
        yield f"{other} has {linears[other]} bits", _with_widths(scheme)
    if not manifest["symmetric"]:
        yield "its codes have zero points", "with --symmetric"
    if online := sorted(set(manifest["rotation"]["sites"]) - FOLDING):
        refused = {site for site, _ in description.family.refusals}
        yield f"{', '.join(online)} are computed online", f"with --rotate {','.join(sorted(FOLDING - refused))}"
    adapter = manifest["adapter"]
    if adapter is not None and adapter["merge"] != FOLD:
        named = bool(adapter.get("names"))
        way = "with --adapter DIR without a name" if named else "with an adapter of a float base and --merge fold"
        yield f"an adapter is merged by {adapter['merge']}", way
    if manifest.get("compensation") is not None:
        yield "branches make up for rounding", "without --compensate"
    if other is None and (unfit := misfit(description, int(manifest["group_size"]))):
        yield unfit[0], f"with {unfit[1]}" if unfit[1] else ""


def _with_widths(scheme: Scheme) -> str:
    return "without --bits-budget and [[layers]]" if scheme.weight_bits == BITS else "with --scheme w4a16"


def lost(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What of an engine its checkpoint does not have, one line each."""
    if Scheme.parse(manifest["scheme"]).quantizes_activations:
        yield f"activations are floats: the engine's {manifest['activations']} are no part of the format"
    if manifest["kv_cache"] != "float":
        yield f"keys and values are floats: the engine's {manifest['kv_cache']} cache is no part of the format"
    bits = sorted({manifest[f"{end}_bits"] for end in ("embedding", "head")} - {16})
    if bits:
        yield f"embedding and head are float16, in the engine of {' and '.join(map(str, bits))} bits"
