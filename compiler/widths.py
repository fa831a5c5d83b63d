"""The grids of a recipe: of its linears, and of embedding and head once the model is known."""

from __future__ import annotations

from dataclasses import replace

from rqc.compiler.recipe import Recipe
from rqc.models.description import EMBEDDING, HEAD, Architecture
from rqc.models.float_grid import AnyGrid, FloatGrid
from rqc.models.grid import Grid
from rqc.passes.tables import table_grid
from rqc.runtime.errors import SchemeError


def linear_grid(recipe: Recipe) -> AnyGrid:
    """The grid of the linears of the blocks; rules and budgets give integer ones other widths."""
    scheme = recipe.scheme
    if scheme.weights != "integer":
        return FloatGrid(scheme.weights, recipe.clip)
    return Grid(scheme.weight_bits, recipe.group_size, recipe.symmetric, recipe.clip, recipe.positive)


def _float_widths(recipe: Recipe) -> tuple[int, ...]:
    """Bits of floats that a table can be stored in: on TensorRT the type of all floats, no other."""
    if recipe.target != "onnx":
        return (32,) if recipe.dtype == "fp32" else (16,)
    return (32,) if recipe.scheme.name == "fp32" else (16, 32)


def table_grid_of(recipe: Recipe, bits: int, hidden_size: int) -> Grid | None:
    """The grid of an embedding or head of that many bits, None where no block divides the hidden size.

    TensorRT's are symmetric with positive scales; 8 bits have one scale per row there.
    """
    if recipe.target == "onnx":
        return table_grid(bits, hidden_size, recipe.group_size, recipe.symmetric, recipe.clip)
    if bits == 8:
        return Grid(8, -1, True, "mse" if recipe.clip == "mse" else "none", positive=True)
    found = table_grid(bits, hidden_size, recipe.group_size, True, recipe.clip)
    return None if found is None else replace(found, positive=True)


def table_widths(recipe: Recipe, architecture: Architecture) -> dict[str, int]:
    """Bits of embedding and head by parameter name; 16 and 32 are floats.

    A hidden size that no block divides keeps its tables in float32. Raises SchemeError for a width that was asked for
    and is none of this scheme's or this model's.
    """
    widths = dict(zip((EMBEDDING, HEAD), recipe.table_bits(tied=architecture.tied), strict=True))
    possible = (*((4, 8) if recipe.scheme.quantized else ()), *_float_widths(recipe))
    for bits in widths.values():
        if bits not in possible:
            raise SchemeError(
                f"an embedding or head of {bits} bits with --scheme {recipe.scheme}",
                hint=f"this scheme stores them in {' or '.join(map(str, possible))} bits",
            )
    hidden = architecture.hidden_size
    unfit = [bits for bits in widths.values() if bits < 16 and table_grid_of(recipe, bits, hidden) is None]
    if unfit and any(bits is not None and bits < 16 for bits in (recipe.embedding_bits, recipe.head_bits)):
        fit = [str(bits) for bits in possible if bits >= 16 or table_grid_of(recipe, bits, hidden) is not None]
        raise SchemeError(
            f"an embedding or head of {min(unfit)} bits: no block divides the hidden size {hidden}",
            hint=f"--embedding-bits and --head-bits {' or '.join(fit)}",
        )
    return {name: 32 if bits in unfit else bits for name, bits in widths.items()}
