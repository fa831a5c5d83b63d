"""Which linears get an adapter: modules by the names that peft users give, checked against their sizes."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rqc.compiler.finetune.settings import Settings
from rqc.models.reference import Part, Reference
from rqc.runtime.errors import InputError, SchemeError


@dataclass(frozen=True, eq=False)
class Target:
    """A linear module of a block by its torch path, and the graph's weights that it holds (several if packed)."""

    path: str
    parts: Mapping[str, Part]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the module."""
        outputs = sum(part.weight.shape[0] for part in self.parts.values())
        return outputs, next(iter(self.parts.values())).weight.shape[1]


def block_linears(reference: Reference) -> list[Target]:
    """The linears of all blocks but the routers, in the model's order."""
    found: dict[str, dict[str, Part]] = defaultdict(dict)
    for claim in reference.description.claims:
        if claim.quantized:
            part = reference.parts[claim.weight]
            found[part.path][claim.weight] = part
    return [Target(path, parts) for path, parts in found.items()]


def chosen_targets(linears: Iterable[Target], settings: Settings) -> list[Target]:
    """Those that the settings name, by the end of their path as peft matches it, or all of them.

    Raises InputError for a name that matches nothing, and for a rank or a pool that does not fit a layer.
    """
    targets = list(linears)
    for name in settings.target_modules:
        if not any(_matches(target.path, name) for target in targets):
            raise _nothing(name, targets)
    if settings.target_modules:
        targets = [each for each in targets if any(_matches(each.path, name) for name in settings.target_modules)]
    for target in targets:
        _check_rank(target, settings)
        _check_pools(target, settings)
    return targets


def _matches(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _nothing(name: str, targets: list[Target]) -> InputError:
    known = list(dict.fromkeys(target.path.rpartition(".")[2] for target in targets))
    near = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
    for target in targets:
        if any(_matches(weight.removesuffix(".weight"), name) for weight in target.parts):
            near = [target.path.rpartition(".")[2]]  # packed in this model
            break
    told = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"target module {name!r} matches no linear of the blocks", hint=f"{told}{', '.join(known)}")


def _check_rank(target: Target, settings: Settings) -> None:
    """Raise InputError for a rank that the layer cannot have."""
    if settings.adapter_type == "qahira":
        return
    outputs, inputs = target.shape
    largest = min(outputs, inputs)
    if settings.adapter_type == "qbara":
        largest //= settings.pooled_inputs**2  # p times the rank on a p-th of the inputs and outputs
    if settings.rank > largest:
        raise InputError(
            f"rank {settings.rank} is larger than {target.path} ({outputs} x {inputs}) allows for "
            f"{settings.adapter_type}",
            hint=f"--rank {largest} or less, or fewer --target-modules" if largest else "--adapter-type lora",
        )


def _check_pools(target: Target, settings: Settings) -> None:
    """Raise SchemeError where outputs, or Q-BaRA's inputs, do not divide into the groups that share a parameter."""
    outputs, inputs = target.shape
    uneven = outputs % settings.repeated_outputs or (
        settings.adapter_type == "qbara" and inputs % settings.pooled_inputs
    )
    if uneven:
        raise SchemeError(
            f"{settings.adapter_type} in groups of {settings.pooled_inputs} inputs and {settings.repeated_outputs} "
            f"outputs does not divide {target.path} ({outputs} x {inputs})",
            hint="another --pool or --repeat, or other --target-modules",
        )
