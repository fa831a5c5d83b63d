"""The options of a fine-tune as one checked value: what flags and `rqc.finetune(...)` become.

Whatever cannot be trained as asked is refused here, before a weight is read, or, where it depends on the sizes of the
layers, by `rqc.compiler.finetune.stage`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rqc.compiler.option_values import NUMBER, PATH, one_of, parsed_values, rotation_values, site_names, typed
from rqc.compiler.recipe import CLIPS, GROUP_SIZES
from rqc.compiler.scheme import SCHEMES
from rqc.models.adapter_basis import ADAPTER_TYPES, BASE_KINDS, MERGED_POOLS, POOLED
from rqc.models.grid import Grid
from rqc.models.nf4 import NormalFloat
from rqc.models.rotation import KINDS, Rotation
from rqc.models.rotation_file import RotationFile
from rqc.runtime.errors import InputError, RotationError, RqcError, SchemeError

BASE_BITS = {"w4": 4, "w3": 3, "w2": 2}
"""Of the bases on an affine grid."""
NF4_BLOCK = NormalFloat.block_size
ACTIVATIONS = (16, 8, 6, 4)
OPTIMIZERS = ("adamw", "lora-plus", "lora-fa", "lora-rite")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("fp32", "bf16", "fp16")
INITS = ("default", "gaussian", "orthogonal", "pissa", "olora", "mica", "loftq", "eora")
LARGEST = 1e30
"""Of any option, so that products of a few of them are numbers of float32."""
KEEPS_FACTOR = ("lora-fa", "lora-rite")
"""Optimizers that train B, alone or with A as a pair."""
CHANGES_BASE = ("pissa", "olora")
"""Starts that take what the adapter holds out of the base: W ← W − c·B₀A₀."""
REPAIRS = ("loftq", "eora")
"""Starts that make up for the error of a base on its grid."""
REFUSED_INITS = {
    "eva": "it needs the activations of a pass over the data, and peft's has no end where batches have few tokens",
    "corda": "it needs covariances of a pass over the data, which rqc does not make before training",
    "lora_ga": "it needs gradients of a pass over the data, which rqc does not make before training",
}


@dataclass(frozen=True)
class Settings:
    """Every option of a fine-tune. Raises an RqcError that names the allowed values for anything else.

    target_modules: names such as q_proj, none of them for all linears of the blocks. pool, repeat: inputs that share a
    column of a pooled adapter and outputs that share a row, None for what its type has. loftq_iterations: alternations
    between quantizing and SVD. base, group_size, symmetric, clip: the grid of the frozen weights. activations: bits
    that the linears' inputs are rounded to while training. rotation_file, by the name of "rotation": what `rqc rotate`
    has learned, with the sites, seed and kind that it says of the others. max_steps: 0 for as many as the epochs have.
    eval_split: the share of the records that is held out, or from 1 on their number. eval_steps, save_steps: optimizer
    steps between evaluations (0: at the end of an epoch) and between checkpoints. seq_len: tokens after which a record
    is cut.
    """

    adapter_type: str = "lora"
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    rslora: bool = False
    pool: int | None = None
    repeat: int | None = None
    init: str = "default"
    loftq_iterations: int = 5
    base: str = "float"
    group_size: int = 32
    symmetric: bool = True
    clip: str = "mse"
    activations: int = 16
    rotate: frozenset[str] = frozenset(("r1", "r4"))
    rotation_seed: int = 0
    hadamard: str = "full"
    rotation_file: RotationFile | None = None
    optimizer: str = "adamw"
    epochs: float = 3.0
    max_steps: int = 0
    batch_size: int = 8
    grad_accum: int = 1
    lr: float = 1e-4
    warmup_ratio: float = 0.01
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seq_len: int = 1024
    seed: int = 0
    device: str = "auto"
    dtype: str = "fp32"
    gradient_checkpointing: bool = False
    eval_split: float = 0.0
    eval_data: Path | None = None
    eval_steps: int = 0
    save_steps: int = 50
    export_plain: Path | None = None

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_combinations()

    @property
    def rotation(self) -> Rotation:
        """The rotation that is trained in; it may have no sites."""
        learned = None if self.rotation_file is None else self.rotation_file.rotation.learned
        return Rotation(self.rotate, self.hadamard, self.rotation_seed, learned)

    @property
    def grid(self) -> Grid | None:
        """The affine grid of the frozen weights; None for floats and for NF4, whose levels are no grid."""
        bits = BASE_BITS.get(self.base)
        return (
            None
            if bits is None
            else Grid(bits, self.group_size, self.symmetric, "mse" if self.clip == "mse" else "none")
        )

    @property
    def scale(self) -> float:
        """c of c·B·A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def pooled_inputs(self) -> int:
        """Neighbouring inputs that share a column of A; 1 where every input has its own."""
        if self.pool is not None:
            return self.pool
        return {"qalora": self.group_size, "qahira": self.group_size, "qbara": 2}.get(self.adapter_type, 1)

    @property
    def repeated_outputs(self) -> int:
        """Neighbouring outputs that share a row of B; 1 where every output has its own."""
        if self.adapter_type == "qbara":
            return self.pooled_inputs
        return 1 if self.repeat is None else self.repeat

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values; a learned rotation by its hashes."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        paths = {name: None if plain[name] is None else str(plain[name]) for name in ("eval_data", "export_plain")}
        rotate = ",".join(sorted(self.rotate)) or "none"
        learned = self.rotation.learned
        said = {} if learned is None else {"learned": learned.hashes}
        del plain["rotation_file"]
        return {**plain, **paths, "target_modules": list(self.target_modules), "rotate": rotate, **said}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from values by name (keyword arguments, flags); a value of None is the default.

        Raises InputError for an unknown name, with the nearest known one, and for a value of the wrong type.
        """
        parsed = parsed_values(values, [each.name for each in fields(cls)], "a fine-tune", _parse)
        return cls(**{**parsed, **rotation_values(parsed)})

    def _check_choices(self) -> None:
        _refused("init", self.init, REFUSED_INITS, INITS)
        choices: list[tuple[str, tuple[object, ...], type[RqcError]]] = [
            ("adapter_type", ADAPTER_TYPES, InputError),
            ("init", INITS, InputError),
            ("base", BASE_KINDS, SchemeError),
            ("group_size", GROUP_SIZES, SchemeError),
            ("clip", CLIPS, SchemeError),
            ("activations", ACTIVATIONS, SchemeError),
            ("hadamard", KINDS, RotationError),
            ("optimizer", OPTIMIZERS, InputError),
            ("device", DEVICES, InputError),
            ("dtype", DTYPES, InputError),
        ]
        for name, allowed, error in choices:
            one_of(name, getattr(self, name), allowed, error)
        Rotation(self.rotate, self.hadamard, self.rotation_seed)  # raises RotationError for unknown sites

    def _check_numbers(self) -> None:
        least = {
            **dict.fromkeys(("rank", "pool", "repeat", "loftq_iterations", "batch_size", "grad_accum"), 1),
            "save_steps": 1,
            "seq_len": 2,
            **dict.fromkeys(("rotation_seed", "seed", "max_steps", "eval_steps", "weight_decay"), 0),
            **dict.fromkeys(("max_grad_norm", "warmup_ratio", "eval_split", "dropout"), 0),
        }
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{each.name} is {value}", hint="a finite number")
            if isinstance(value, float) and abs(value) > LARGEST:
                raise InputError(f"{each.name} is {value:g}", hint=f"{LARGEST:g} at most: float32 ends soon after")
            if each.name in least and value is not None and value < least[each.name]:
                raise InputError(f"{each.name} is {value}", hint=f"{each.name} is {least[each.name]} or more")
        for name in ("alpha", "epochs", "lr"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is {getattr(self, name)}", hint=f"{name} is more than 0")
        for name in ("dropout", "warmup_ratio"):
            if getattr(self, name) >= 1:
                raise InputError(f"{name} is {getattr(self, name)}", hint=f"{name} is a share below 1, such as 0.05")

    def _check_combinations(self) -> None:
        self._check_init()
        self._check_pools()
        self._check_optimizer()
        if self.base == "nf4" and self.adapter_type in MERGED_POOLS:
            raise SchemeError(
                f"{self.adapter_type} on nf4: such an adapter becomes zero points, and NF4 has none",
                hint="--base w4, or --adapter-type lora",
            )
        if self.base == "nf4" and self.group_size not in (NF4_BLOCK, _default("group_size")):
            raise SchemeError(f"group_size {self.group_size} for nf4", hint=f"NF4 has blocks of {NF4_BLOCK}")
        if self.grid is not None and self.activations < 16 and f"{self.base}a{self.activations}" not in SCHEMES:
            fitting = ", ".join(name for name in SCHEMES if name.startswith(f"{self.base}a"))
            raise SchemeError(
                f"activations of {self.activations} bits on base {self.base}: no engine has this arithmetic",
                hint=f"schemes with these weights: {fitting}",
            )
        if self.eval_split and self.eval_data is not None:
            raise InputError("eval_split and eval_data both name records to evaluate on", hint="give one of them")

    def _check_optimizer(self) -> None:
        if self.optimizer == "lora-fa" and self.adapter_type not in ("lora", "dora", "qalora"):
            raise InputError(
                f"optimizer lora-fa for {self.adapter_type}, which has no A of its own beside B",
                hint="--optimizer adamw",
            )
        if self.optimizer == "lora-rite" and self.adapter_type == "qahira":
            raise InputError(
                "optimizer lora-rite for qahira: it steps pairs of factors, and qahira has one matrix",
                hint="--optimizer adamw",
            )

    def _check_init(self) -> None:
        kind, dense = self.adapter_type, self.adapter_type in ("lora", "dora")
        if self.init != "default" and not dense:
            raise InputError(
                f"init {self.init} for {kind}: a pooled adapter cannot hold what it computes", hint="--init default"
            )
        if self.init in REPAIRS and kind == "dora":
            raise InputError(
                f"init {self.init} for dora: its magnitudes would be those of the base without what repairs it",
                hint="--adapter-type lora, or --init default",
            )
        if self.init in REPAIRS and self.base == "float":
            raise InputError(
                f"init {self.init} on a float base: there is no quantization error that it could make up for",
                hint="--base w4, w3, w2 or nf4",
            )
        if self.init in CHANGES_BASE and self.base != "float":
            raise InputError(
                f"init {self.init} on {self.base}: it takes the adapter out of the base, off the grid that is deployed",
                hint="--init loftq or eora, or --base float",
            )
        if self.init == "mica" and kind == "dora":
            raise InputError("init mica for dora, which peft does not have", hint="--adapter-type lora")
        if self.init == "mica" and self.optimizer in KEEPS_FACTOR:
            raise InputError(
                f"init mica with {self.optimizer}: it trains A alone, and B stays as it starts",
                hint="--optimizer adamw",
            )
        if self.init == "orthogonal" and self.rank % 2:
            raise InputError(f"init orthogonal with rank {self.rank}", hint="an even rank")

    def _check_pools(self) -> None:
        kind = self.adapter_type
        if self.pool is not None and kind not in POOLED:
            raise InputError(f"pool {self.pool} for {kind}, which pools nothing", hint="--adapter-type qalora")
        if self.repeat is not None and kind != "qahira":
            raise InputError(f"repeat {self.repeat} for {kind}", hint="repeat is of --adapter-type qahira")
        if self.rslora and kind == "qahira":
            raise InputError("rslora for qahira, which has no rank to scale by", hint="leave --rslora out")
        if kind in MERGED_POOLS and self.group_size == -1:
            raise SchemeError(f"{kind} pools inputs in groups and group_size is -1", hint="--group-size 32")
        if kind in MERGED_POOLS and self.pooled_inputs % self.group_size:
            raise SchemeError(
                f"pool {self.pooled_inputs} is no multiple of group_size {self.group_size}: {kind} would not become "
                "zero points",
                hint=f"--pool {self.group_size}",
            )


def _default(name: str) -> Any:
    return next(each.default for each in fields(Settings) if each.name == name)


def _refused(name: str, value: str, reasons: Mapping[str, str], allowed: tuple[str, ...]) -> None:
    """Raise InputError for a choice that is known elsewhere, with the reason why it is not one here."""
    if (reason := reasons.get(value)) is not None:
        raise InputError(f"{name} {value}: {reason}", hint=f"allowed: {', '.join(allowed)}")


def _parse(name: str, value: Any) -> Any:
    """`value` as the field `name` holds it. Raises InputError, or RotationError for an unknown site."""
    if name == "rotate":
        return _parse_rotate(value)
    if name == "target_modules":
        return _parse_names(value)
    if name == "rotation_file":
        return value if isinstance(value, RotationFile) else RotationFile.read(typed("rotation", value, PATH))
    if name in ("eval_data", "export_plain"):
        return Path(typed(name, value, PATH))
    default = _default(name)
    if isinstance(default, float):
        return float(typed(name, value, NUMBER))
    return typed(name, value, type(default) if isinstance(default, (bool, str)) else int)


def _parse_rotate(value: Any) -> frozenset[str]:
    """'none', 'r1,r4', or names in a list."""
    names = site_names(value, "none")
    if names == ["auto"]:
        raise RotationError("an adapter is trained in one basis, and auto names none", hint="--rotate r1,r4 or none")
    return Rotation.parse(names).sites


def _parse_names(value: Any) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f"target_modules is {value!r}", hint="names such as q_proj,v_proj")
    return tuple(dict.fromkeys(name.strip() for name in names))
