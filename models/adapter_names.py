"""The linears of an adapter by the names that PyTorch gives their modules, and by the graph's."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from rqc.models.algebra import Array, Read
from rqc.models.description import EMBEDDING, HEAD, Claim, Description, segments
from rqc.runtime.errors import CheckpointError, InputError, UnsupportedModelError

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_PEFT = re.compile(r"^(base_model\.model\.)+")
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")
"""Modules that torch.compile, FSDP and activation checkpointing put around others: no part of a linear's name."""


@dataclass(frozen=True)
class Place:
    """Where a linear of the graph lies in PyTorch: a module's path and its rows there, None for all of them."""

    path: str
    rows: slice | None = None


def place_of(description: Description, claim: Claim) -> Place:
    """The module in the checkpoint that holds a claimed linear: its own, or the packed or renamed one of its family."""
    for path, source, packed in description.family.sources:
        if path != claim.linear.path:
            continue
        expert = claim.weight.split("experts.")[1].split(".")[0] if claim.expert else ""
        stem, _ = claim.weight.rsplit(path.replace("{e}", expert), 1)
        rows = segments(packed, description.sizes())[claim.linear.writes[0]] if packed else None
        return Place(stem + source.replace("{e}", expert), rows)
    return Place(claim.weight.removesuffix(".weight"))


def torch_names(description: Description) -> dict[str, str]:
    """Graph names of linears that PyTorch packs with others (phi3's q, k, v), to the path of the packed module.

    The parts of one module stand in the order of its rows: what `write_adapter` reads.
    """
    places = [(claim.weight, place_of(description, claim)) for claim in description.claims]
    packed = [(name, place, place.rows.start) for name, place in places if place.rows is not None]
    return {name: place.path for name, place, _ in sorted(packed, key=lambda part: (part[1].path, part[2]))}


def graph_index(description: Description) -> dict[str, list[tuple[str, slice | None]]]:
    """Per module path that an adapter may name, the graph's weights there and their rows in it."""
    index: dict[str, list[tuple[str, slice | None]]] = {HEAD.removesuffix(".weight"): [(HEAD, None)]}
    for claim in description.claims:
        index[claim.weight.removesuffix(".weight")] = [(claim.weight, None)]
        place = place_of(description, claim)
        if place.path + ".weight" != claim.weight:
            index.setdefault(place.path, []).append((claim.weight, place.rows))
    return index


def expected_shape(description: Description, name: str) -> tuple[int, int]:
    """[out, in] of a linear or of the head, by its graph name."""
    a = description.architecture
    return (a.vocab_size, a.hidden_size) if name == HEAD else description.shape(description.by_weight[name])


def module_path(key: str, known: Callable[[str], bool]) -> str:
    """The module's path in a causal language model: without peft's prefix and without what wraps modules.

    An adapter that was trained on the bare decoder lacks the leading "model.": it is put back.
    """
    path = _PEFT.sub("", key)
    path = _WRAPPERS.sub("", path).removeprefix(".")
    return f"model.{path}" if not known(path) and known(f"model.{path}") else path


def unknown_module(description: Description, path: str) -> InputError | UnsupportedModelError:
    """The error for a module of an adapter that the model does not have."""
    model = description.architecture
    layer = _LAYER.match(path if path.startswith("model.") else f"model.{path}")
    if layer and int(layer[1]) >= model.layers:
        return InputError(
            f"the adapter has a part for {path!r}, the model has {model.layers} layers",
            hint="the adapter is of another model: give the model that it was trained on",
        )
    if path.endswith(EMBEDDING.removeprefix("model.").removesuffix(".weight")):
        return UnsupportedModelError(
            f"the adapter changes the embedding ({path!r}), which is a table and no linear",
            hint="train without embed_tokens in target_modules, or merge it with peft: merge_and_unload()",
        )
    return UnsupportedModelError(
        f"the adapter has a part for {path!r}, which is no linear of a {model.model_type} that rqc knows",
        hint="if it is of this model, merge it with peft (merge_and_unload) and compile the result",
    )


def weight_reader(description: Description, read: Read) -> Read:
    """`read` by the checkpoint's names or by the graph's, extended to the graph's: of a packed weight the part's
    rows."""

    def read_graph(name: str) -> Array:
        claim = description.by_weight.get(name)
        place = None if claim is None else place_of(description, claim)
        if place is None or f"{place.path}.weight" == name:
            return read(name)
        try:
            return read(name)
        except CheckpointError:  # stored under its family's own name
            whole = read(f"{place.path}.weight")
            return whole if place.rows is None else whole[place.rows]

    return read_graph
