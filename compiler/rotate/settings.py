"""The options of learning a rotation as one checked value: what flags and `rqc.rotate(...)` become."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rqc.compiler.option_values import NUMBER, PATH, one_of, parsed_values, site_names, typed
from rqc.compiler.recipe import GROUP_SIZES
from rqc.compiler.scheme import SCHEMES, Scheme
from rqc.models.grid import Grid
from rqc.models.learned import LEARNABLE
from rqc.models.rotation import KINDS, Rotation
from rqc.runtime.errors import InputError, RotationError, SchemeError

WEIGHTS = ("float", "rtn")
LOSSES = ("kl", "ce")
CACHES = ("float", "int4")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("fp32", "bf16")
_LEAST = {"group_size": -1, "rotation_seed": 0, "steps": 1, "batch_size": 1, "seq_len": 2, "seed": 0, "save_steps": 1}


@dataclass(frozen=True)
class RotateSettings:
    """Every option of `rqc rotate`. Raises an RqcError that names the allowed values for anything else.

    scheme, group_size, activation_symmetric, activation_clip, kv_cache: what the engine will round. weights: "float",
    or "rtn": rounded to nearest too, symmetric or not, with unclipped ranges. rotate, rotation_seed, hadamard: the
    rotation that is started from, whose R1 and R2 are learned; what else it has stays. loss: "kl", how far the next
    token's distribution is from that of the model in floats, or "ce", the cross-entropy of the text. calibration:
    text or records (`model_text`), None for the text that ships. lr: how far a step turns at first (‖α Y‖₁ of
    `CayleySGD`), up to 1; it follows a cosine. seed: of the order of the text.
    """

    scheme: Scheme = SCHEMES["w4a4"]
    group_size: int = 32
    symmetric: bool = True
    activation_symmetric: bool = True
    activation_clip: float = 1.0
    kv_cache: str = "float"
    weights: str = "float"
    rotate: frozenset[str] = frozenset(("r1", "r2", "r4"))
    rotation_seed: int = 0
    hadamard: str = "full"
    loss: str = "kl"
    calibration: Path | None = None
    steps: int = 100
    lr: float = 0.2
    momentum: float = 0.9
    batch_size: int = 1
    seq_len: int = 1024
    seed: int = 0
    device: str = "auto"
    dtype: str = "fp32"
    gradient_checkpointing: bool = False
    save_steps: int = 10

    def __post_init__(self) -> None:
        one_of("group_size", self.group_size, GROUP_SIZES, SchemeError)
        one_of("kv_cache", self.kv_cache, CACHES, SchemeError)
        one_of("weights", self.weights, WEIGHTS, SchemeError)
        one_of("loss", self.loss, LOSSES, InputError)
        one_of("hadamard", self.hadamard, KINDS, RotationError)
        one_of("device", self.device, DEVICES, InputError)
        one_of("dtype", self.dtype, DTYPES, InputError)
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}", hint=f"{name} is {least} or more")
        if not (0 < self.lr <= 1):
            raise InputError(f"lr is {self.lr}", hint="lr is more than 0 and up to 1, such as 0.2")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum is {self.momentum}", hint="momentum is a share below 1, such as 0.9")
        if not 0 < self.activation_clip <= 1:
            raise InputError(f"activation_clip is {self.activation_clip}", hint="a ratio above 0 and up to 1")
        if not self.rotation.sites & set(LEARNABLE):
            raise RotationError(f"--rotate {self.rotation} leaves nothing to learn", hint="--rotate r1,r2,r4")
        self._check_rounding()

    def _check_rounding(self) -> None:
        """Raise SchemeError where nothing is rounded that a rotation would change, or not as asked."""
        eight = self.scheme.activation_bits == 8
        if self.scheme.activation_bits >= 16 and self.weights == "float" and self.kv_cache == "float":
            raise SchemeError(
                f"--scheme {self.scheme} with weights and cache in floats: nothing is rounded, so all rotations "
                "are the same",
                hint="--weights rtn, or a scheme of rounded activations such as w4a4",
            )
        if self.scheme.small_floats:
            raise SchemeError(
                f"rotations are learned for grids of integers, --scheme {self.scheme} has weights of floats",
                hint="--scheme w4a16 --weights rtn learns one that such an engine takes too",
            )
        if not self.scheme.quantized and self.weights == "rtn":
            raise SchemeError(f"--weights rtn with --scheme {self.scheme}, which rounds none", hint="--scheme w4a4")
        if (eight or self.scheme.activation_bits >= 16) and not (
            self.activation_symmetric and self.activation_clip == 1
        ):
            raise SchemeError(
                f"an asymmetric or clipped grid of activations with --scheme {self.scheme}",
                hint="--scheme w4a4 or w6a6, or leave the option out",
            )

    @property
    def rotation(self) -> Rotation:
        """The rotation that is started from."""
        return Rotation(self.rotate, self.hadamard, self.rotation_seed)

    @property
    def grid(self) -> Grid | None:
        """The grid of the weights, None where they are floats."""
        bits = self.scheme.weight_bits
        return None if self.weights == "float" else Grid(bits, self.group_size, self.symmetric)

    def to_json(self) -> dict[str, Any]:
        """The settings that decide what is learned, as plain values; the text is known by its tokens."""
        elsewhere = ("calibration", "device", "gradient_checkpointing", "save_steps")
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in elsewhere}
        return {**plain, "scheme": self.scheme.name, "rotate": str(self.rotation)}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> RotateSettings:
        """Settings from values by name; a value of None is the default.

        Raises InputError for an unknown name, with the nearest known one, and for a value of the wrong type.
        """
        parsed = parsed_values(values, [each.name for each in fields(cls)], "rotate", _parse)
        settings = cls(**parsed)
        settings._check_grid(parsed)
        return settings

    def _check_grid(self, asked: Collection[str]) -> None:
        """Raise SchemeError for options of a grid, of those that were asked for by name, that no rounding has."""
        blocks = self.grid is not None or self.scheme.activation_bits == 8
        unused = [name for name, used in (("group_size", blocks), ("symmetric", self.grid is not None)) if not used]
        if found := [name for name in unused if name in asked]:
            raise SchemeError(
                f"{' and '.join(found)} with --scheme {self.scheme} and weights in floats, where nothing has it",
                hint="--weights rtn, or leave it out",
            )


def _parse(name: str, value: Any) -> Any:
    """`value` as the field `name` holds it. Raises InputError, SchemeError or RotationError."""
    if name == "scheme":
        return value if isinstance(value, Scheme) else Scheme.parse(typed(name, value, str))
    if name == "rotate":
        return Rotation.parse(site_names(value, "r1,r2,r4")).sites
    if name == "calibration":
        return Path(typed(name, value, PATH))
    default = next(each.default for each in fields(RotateSettings) if each.name == name)
    if isinstance(default, float):
        return float(typed(name, value, NUMBER))
    return typed(name, value, type(default))
