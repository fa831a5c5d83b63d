"""How many bits each linear of the blocks keeps: what rules say, and within a budget what the calibration text says.

A budget is the mean of the bits of codes over all linears of the blocks, weight by weight; scales come on top (32 bits
for each group). Rules stand; the rest is chosen unit by unit (q/k/v, o, gate/up, down of a layer) among the widths that
take no more room than their bits say, so that the sum of the measured errors is least.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rqc.compiler.adapters.merge import Merge
from rqc.compiler.calibration.calibration_text import required_ids, tell_few
from rqc.compiler.calibration.knapsack import Item, choose_widths
from rqc.compiler.calibration.sensitivity import Errors, Unit, sensitivities, units_of
from rqc.compiler.importer import Imported, import_model
from rqc.compiler.instruments import Progress
from rqc.compiler.layer_rules import widths_by_rule
from rqc.compiler.passlist import frame
from rqc.compiler.recipe import Recipe
from rqc.compiler.sizes import attention_bytes, resident_bytes
from rqc.compiler.targets.layer_bits import budget_widths, check_budget_range, check_layer_bits
from rqc.models.description import Description
from rqc.models.grid import Grid
from rqc.models.rotation import Rotation
from rqc.runtime.errors import ResourceError, SchemeError

TOKENS = 2048


@dataclass(frozen=True)
class Budget:
    """What is left to choose: units without a rule, their widths, and the bits that all of them may take."""

    units: tuple[Unit, ...]
    widths: tuple[int, ...]
    bits: int

    @classmethod
    def of(cls, recipe: Recipe, description: Description, fixed: Mapping[str, int]) -> Budget:
        """What rules leave of a recipe's budget. Raises SchemeError where they leave too little, or nothing."""
        assert recipe.bits_budget is not None
        claims = [claim for claim in description.claims if claim.quantized]
        sizes = {claim.weight: prod(description.shape(claim)) for claim in claims}
        units = units_of(description, [claim for claim in claims if claim.weight not in fixed])
        if not units:
            raise SchemeError(
                f"--bits-budget {recipe.bits_budget:g} with layers that give every linear its bits",
                hint="leave the budget or some of [[layers]] out",
            )
        widths, total = budget_widths(recipe), sum(sizes.values())
        taken = sum(sizes[name] * bits for name, bits in fixed.items())
        least = taken + min(widths) * sum(unit.size for unit in units)
        bits = int(recipe.bits_budget * total + 1e-6)
        if least > bits:
            raise SchemeError(
                f"--bits-budget {recipe.bits_budget:g} with these layers, which leave an average of at least "
                f"{least / total:.3f} bits",
                hint=f"--bits-budget {-(-1000 * least // total) / 1000:g}, or fewer bits in [[layers]]",
            )
        return cls(tuple(units), widths, bits - taken)

    def spread(self) -> dict[str, int]:
        """Two neighbouring widths in turn, evenly over the model: a choice without measurement, by weight name."""
        mean = self.bits / max(1, sum(unit.size for unit in self.units))
        low = max(width for width in self.widths if width <= mean)
        high = min((width for width in self.widths if width > mean), default=low)
        found, saved = [], 0.0
        for unit in self.units:
            saved += (mean - low) * unit.size
            wide = high > low and saved >= (high - low) * unit.size
            saved -= (high - low) * unit.size if wide else 0
            found.append(high if wide else low)
        return _by_weight(self.units, found)

    def chosen(self, errors: Errors) -> dict[str, int]:
        """The widths of least total error, by weight name."""
        items = [Item(unit.size, errors[unit.name]) for unit in self.units]
        return _by_weight(self.units, choose_widths(items, self.bits))


def _by_weight(units: Sequence[Unit], widths: Sequence[int]) -> dict[str, int]:
    return {name: bits for unit, bits in zip(units, widths, strict=True) for name in unit.weights}


def with_widths(recipe: Recipe, imported: Imported) -> Recipe:
    """The recipe with the width of every linear that a rule names; under a budget the others' spread evenly, until they
    are measured.

    Raises InputError or SchemeError for rules that match nothing, and for widths that the target does not run.
    """
    check_budget_range(recipe)
    fixed = widths_by_rule(recipe.layers, imported.description)
    recipe = replace(recipe, widths=fixed)
    if recipe.bits_budget is not None:
        recipe = replace(recipe, widths=fixed | Budget.of(recipe, imported.description, fixed).spread())
    check_layer_bits(recipe, imported.description)
    return recipe


def measured_widths(
    recipe: Recipe,
    imported: Imported,
    rotation: Rotation,
    merge: Merge | None,
    progress: Progress,
    *,
    measure: bool = True,
) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe with the widths that fill its budget best in this frame, and what a report says of them; without a
    budget, as it is. measure: whether weights may be read; without, widths stay spread evenly.

    Raises InputError without a tokenizer, ResourceError where measuring does not fit under --max-memory.
    """
    if recipe.bits_budget is None:
        return recipe, _said(recipe, imported.description) if recipe.widths else None
    description = imported.description
    if not measure:
        progress.line(f"bits budget {recipe.bits_budget:g}: a dry run measures nothing, widths are spread evenly")
        return recipe, _said(recipe, description)
    fixed = widths_by_rule(recipe.layers, description)
    budget, ids = Budget.of(recipe, description, fixed), _text(recipe, imported)
    tell_few(f"bits budget {recipe.bits_budget:g}", recipe, ids, TOKENS, progress)
    fresh = import_model(imported.checkpoint.directory)
    for step in frame(recipe, fresh.description, rotation, merge):
        step(fresh.model)
    errors = sensitivities(
        fresh.model,
        budget.units,
        lambda bits: Grid(bits, recipe.group_size, recipe.symmetric, recipe.clip, recipe.positive),
        budget.widths,
        ids,
        lambda done, total: progress.advance("sensitivity", done, total),
    )
    recipe = replace(recipe, widths=fixed | budget.chosen(errors))
    said = _said(recipe, description)
    counts = ", ".join(f"{count} of {bits}" for bits, count in said["linears"].items())
    progress.line(
        f"bits budget {recipe.bits_budget:g}: {said['average_bits']:g} bits on average, linears: {counts} bits "
        f"(sensitivity on {ids.size} calibration tokens)"
    )
    units = {
        unit.name: {"bits": recipe.widths[unit.weights[0]], "errors": {str(b): e for b, e in errors[unit.name].items()}}
        for unit in budget.units
    }
    return recipe, {**said, "tokens": int(ids.size), "units": units}


def _said(recipe: Recipe, description: Description) -> dict[str, Any]:
    """The budget, the average of all linears, and how many have which width."""
    sizes = {claim.weight: prod(description.shape(claim)) for claim in description.claims if claim.quantized}
    widths = {name: recipe.widths.get(name, recipe.scheme.weight_bits) for name in sizes}
    average = sum(sizes[name] * bits for name, bits in widths.items()) / sum(sizes.values())
    counts = {str(bits): count for bits, count in sorted(Counter(widths.values()).items())}
    return {"bits_budget": recipe.bits_budget, "average_bits": round(average, 4), "linears": counts}


def _text(recipe: Recipe, imported: Imported) -> NDArray[np.int64]:
    what = "--bits-budget is filled by what calibration text says"
    ids = required_ids(recipe, imported, TOKENS, what, "name the widths in [[layers]]")
    needed = resident_bytes() + measuring_bytes(imported.description, *ids.shape)
    if recipe.max_memory is not None and needed > recipe.max_memory:
        raise ResourceError(
            f"measuring how sensitive layers are takes about {needed / 2**30:.2f} GiB, "
            f"--max-memory is {recipe.max_memory / 2**30:.2f} GiB",
            hint="raise --max-memory, or name the widths in [[layers]], which measures nothing",
        )
    return ids


def measuring_bytes(description: Description, count: int, length: int) -> int:
    """A float block twice (its weights, and transposed by the session), the largest of them four times while it is
    folded and rounded, and the activations of a block."""
    a = description.architecture
    sizes = [prod(description.shape(claim)) for claim in description.claims if claim.layer == 0]
    tokens = count * length
    activations = 4 * tokens * (10 * a.hidden_size + 4 * a.intermediate_size)
    return 8 * sum(sizes) + 32 * max(sizes) + activations + attention_bytes(a, tokens, length)
