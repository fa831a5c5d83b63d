"""How adapters go into an engine: their frame, their grid and the way they are merged, decided before a weight is read.

An adapter that was trained in a basis brings that basis, one that was trained on a quantized base brings that grid;
what is asked for beside them must fit. Ways to merge (reference/adapters.md, sections 8 to 10): fold, W ← W + ΔW before
the grid; zero-point, z′ = z − D/s for an adapter that is constant in every block; branch, a low-rank path beside the
linear. Several adapters are merged as their sum; those with names stay beside the weights, to be switched at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from rqc.compiler.adapters.bases import bound, check_together, in_basis, leading, on_grid, short
from rqc.compiler.adapters.merge import AdapterPart, Merge
from rqc.compiler.adapters.survival import beside_survival, check_survival, fold_survival
from rqc.compiler.adapters.ways import way, ways_text
from rqc.compiler.importer import Imported
from rqc.compiler.instruments import Progress
from rqc.compiler.recipe import Recipe
from rqc.models.adapter import Adapter
from rqc.models.adapter_frames import to_plain
from rqc.models.algebra import Read, dimensions
from rqc.models.description import Description
from rqc.models.rotation import Rotation
from rqc.runtime.errors import BasisMismatchError

__all__ = ["Merge", "open_adapter", "survival_of"]


def open_adapter(recipe: Recipe, imported: Imported, progress: Progress) -> tuple[Recipe, Merge | None]:
    """The adapters that a recipe names, checked against the model and each other, and the recipe with what they bring
    along.

    Raises InputError (a damaged adapter, one of another base), BasisMismatchError (a basis that one cannot be carried
    into), SchemeError (a grid or a way to merge that does not fit), UnsupportedModelError (a kind that is not known).
    """
    if not recipe.adapter:
        return recipe, None
    architecture = imported.description.architecture
    tied = architecture.tied and recipe.tied == "keep"
    description = replace(imported.description, architecture=replace(architecture, tied=tied))
    read = imported.checkpoint.read
    adapters = [Adapter.open(source.path, description, read) for source in recipe.adapter]
    for adapter in adapters:
        adapter.check(description, imported.checkpoint.fingerprint())
    check_together(adapters, switchable=recipe.switchable)
    leader = leading(adapters)
    if leader is not None and leader.basis is not None:
        recipe = on_grid(in_basis(recipe, leader.basis), adapters, progress)
    recipe.check_activations()
    parts = tuple(
        _part(recipe, adapter, source.name, description, read)
        for adapter, source in zip(adapters, recipe.adapter, strict=True)
    )
    merge = Merge(parts, recipe.merge, description, read)
    merge = replace(merge, how=way(recipe, merge))
    for part in parts:
        _tell(part, merge, recipe, progress)
    return recipe, merge


def _tell(part: AdapterPart, merge: Merge, recipe: Recipe, progress: Progress) -> None:
    basis, name = part.adapter.basis, "" if part.name is None else f" {part.name}"
    merged = "switched at run time" if merge.names else f"merged by {merge.how}"
    progress.line(f"adapter{name}: {part.adapter.kind}, {len(part.deltas)} linears, {merged}")
    if basis is not None and basis.activations not in (16, recipe.scheme.activation_bits):
        progress.line(
            f"the adapter was trained with {basis.activations}-bit activations, --scheme {recipe.scheme} has others"
        )


def _part(recipe: Recipe, adapter: Adapter, name: str | None, description: Description, read: Read) -> AdapterPart:
    """An adapter in the model's own basis or in that of the frame, whichever it can be merged in exactly.

    Raises BasisMismatchError for one that has no counterpart in the basis asked for.
    """
    basis, rotation = adapter.basis, recipe.rotation
    if basis is None:
        return AdapterPart(adapter, adapter.deltas, True, name)
    assert rotation is not None  # `in_basis` set it
    wanted = rotation.basis(dimensions(description)) if rotation.sites else None
    if wanted == basis.basis:
        return AdapterPart(adapter, adapter.deltas, False, name)
    if (obstacle := bound(adapter)) is not None:
        raise BasisMismatchError(
            f"{adapter.directory} was trained in basis {short(basis.basis)} ({basis.rotation}), "
            f"--rotate {rotation} asks for {short(wanted)}: {obstacle}",
            hint="leave --rotate, --rotation, --hadamard and --rotation-seed out: the adapter brings its basis along",
        )
    deltas = {n: to_plain(n, d, description, basis.rotation, read) for n, d in adapter.deltas.items()}
    return AdapterPart(adapter, deltas, True, name)


def survival_of(
    model: ir.Model, merge: Merge, recipe: Recipe, rotation: Rotation, progress: Progress
) -> dict[str, float]:
    """What is left in each linear of a lowered graph: of the sum of adapters, or of the worst of those to be switched.

    Raises ParityError below the recipe's least.
    """
    found = fold_survival(model, merge.folded, progress)
    beside = merge.parts_in_frame(rotation) if merge.names else [merge.in_frame(rotation)]
    for deltas in beside:
        for name, share in beside_survival(model, deltas).items():
            found[name] = min(share, found.get(name, share))
    survival: Mapping[str, float] = {name: found[name] for name in merge.weights}
    check_survival(survival, recipe.min_survival, ways_text(recipe, merge))
    return dict(survival)
