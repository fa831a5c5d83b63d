"""Branches of codes whose kernels round what they read: each product compared with PyTorch's arithmetic on equal codes.

What a branch's first product gives is rounded once more in front of the second. Of two sums that differ in the last
bit, one in thousands falls on another code there, which would count as an error of the linear.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.compiler.verify.belonging import relative
from rqc.compiler.verify.stored import StoredGraph, StoredLinear
from rqc.compiler.verify.stored_sides import StoredBranch, branch_of, kernel_rounds
from rqc.models.grid import fake_quantize_activations
from rqc.passes.base import BRANCH_B

F32 = NDArray[np.float32]
Run = Callable[[ir.Value, ir.Value, F32], NDArray[np.generic]]
"""Computes a value of the graph [tokens, out] from another that is given [tokens, in]."""


def rounding_branches(stored: StoredGraph, linear: StoredLinear) -> list[ir.Node]:
    """The second products of branches beside a linear whose kernels round what they read."""
    marked = (node for node in stored.model.graph if BRANCH_B in node.metadata_props and kernel_rounds(node))
    return [node for node in marked if set(linear.names) & set(node.metadata_props[BRANCH_B].split("+"))]


def branch_error(stored: StoredGraph, linear: StoredLinear, x: F32, run: Run) -> float:
    """‖t − t_ref‖ / ‖t_ref‖ of the worst product of a linear's branches, for x [tokens, in] and for PyTorch's t."""
    worst = 0.0
    for node in rounding_branches(stored, linear):
        branch, source = branch_of(stored, node), node.inputs[0]
        assert source is not None
        t, y = _products(branch, x)
        first, second = run(linear.input, source, x), run(source, node.outputs[0], t)
        worst = max(worst, relative(first, t), relative(second, y))
    return worst


def _products(branch: StoredBranch, x: F32) -> tuple[F32, F32]:
    """t [tokens, r] and y [tokens, out] of a branch as PyTorch computes them."""
    before, between = branch.blocks
    t = _rounded(x, before) @ np.asarray(branch.a, np.float32).T
    return t, _rounded(t, between) @ np.asarray(branch.b, np.float32).T


def _rounded(x: F32, block: int | None) -> F32:
    return x if block is None else fake_quantize_activations(x, block)
