"""How wide embedding and head are stored, once the model is known."""

from __future__ import annotations

from rqc.compiler.recipe import Recipe
from rqc.models.description import EMBEDDING, HEAD, Architecture
from rqc.passes.tables import table_grid
from rqc.runtime.errors import SchemeError


def table_widths(recipe: Recipe, architecture: Architecture) -> dict[str, int]:
    """Bits of embedding and head by parameter name; 16 and 32 are floats.

    A hidden size that no block divides keeps its tables in float32. Raises SchemeError for a width that was asked for
    and is none of this scheme's or this model's.
    """
    asked = (recipe.embedding_bits, recipe.head_bits)
    widths = dict(zip((EMBEDDING, HEAD), recipe.table_bits(tied=architecture.tied), strict=True))
    possible = (4, 8, 16, 32) if recipe.scheme.quantized else (16, 32)[recipe.scheme.float_type == "float32" :]
    for bits in widths.values():
        if bits not in possible:
            raise SchemeError(
                f"an embedding or head of {bits} bits with --scheme {recipe.scheme}",
                hint=f"this scheme stores them in {' or '.join(map(str, possible))} bits",
            )
    hidden = architecture.hidden_size
    if table_grid(8, hidden, recipe.group_size, recipe.symmetric, recipe.clip) is not None:
        return widths
    if any(bits is not None and bits < 16 for bits in asked):
        raise SchemeError(
            f"an embedding or head of {min(widths.values())} bits: no block divides the hidden size {hidden}",
            hint="--embedding-bits and --head-bits 16 or 32",
        )
    return {name: 32 if bits < 16 else bits for name, bits in widths.items()}
