"""The grid of activations that a recipe asks for, where the graph rounds them."""

from __future__ import annotations

from rqc.compiler.recipe import Recipe
from rqc.models.token_grid import TokenGrid


def token_grid(recipe: Recipe) -> TokenGrid:
    """Per token; not clipped where the ratio is searched: then the linears are marked with theirs."""
    clip = 1.0 if recipe.activation_clip == "auto" else recipe.activation_clip
    return TokenGrid(recipe.scheme.activation_bits, recipe.activation_symmetric, clip)
