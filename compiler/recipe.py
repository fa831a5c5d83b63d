"""The options of a compile as one checked value: what flags, recipe files (TOML) and `rqc.compile(...)` all become.

A flag overrides the recipe file, which overrides the default. Keys of a file are the names of the flags, with - or _.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from rqc.compiler.adapters.sources import AdapterSource, parse_sources
from rqc.compiler.compensation_options import check_compensation
from rqc.compiler.float_options import check_floats
from rqc.compiler.layer_rules import LayerRule, check_budget, parse_rules
from rqc.compiler.option_values import NUMBER, PATH, by_field, one_of, parsed_values, rotation_values, site_names, typed
from rqc.compiler.scheme import SCHEMES, Scheme
from rqc.models.rotation import KINDS, SITES, Rotation
from rqc.models.rotation_file import RotationFile
from rqc.runtime.capabilities import parse_sms
from rqc.runtime.errors import InputError, RotationError, RqcError, SchemeError, TargetError
from rqc.runtime.profiles import Profile

TARGETS = ("onnx", "tensorrt-rtx", "tensorrt")
DTYPES = ("fp16", "bf16", "fp32")
GROUP_SIZES = (16, 32, 64, 128, 256, -1)
TABLE_BITS = (4, 8, 16, 32)
KV_CACHES = ("float", "int8", "int4")
METHODS = ("rtn", "gptq", "auto")
CLIPS = ("none", "mse")
TIED = ("keep", "untie")
DEVICES = ("cpu", "cuda")
DERIVED = ("given", "positive", "widths", "clips")
"""Fields that are no options."""
TEXTS = (
    "target",
    "clip",
    "method",
    "compensate",
    "sparsity",
    "prune",
    "hadamard",
    "kv_cache",
    "tied",
    "merge",
    "dtype",
    "device",
)
"""Options that are a word."""
MERGES = ("auto", "fold", "zero-point", "branch")


@dataclass(frozen=True)
class Recipe:
    """Every option of a compile. Raises an RqcError that names the allowed values for anything else.

    compensate_rank: of the branch beside each linear (of fewer dimensions: all it has), compensate_budget: bits of all
    branches for each weight, spread where they take off most; sparsity, prune: which weights are zero, and by what.
    activation_symmetric, activation_clip: of a grid per token; "auto" is searched on the calibration text, tensor
    by tensor. rotate: "auto", or the rotated sites (none of them: no rotation). rotation_file, by the name of
    "rotation": what `rqc rotate` has learned, with the sites, seed and kind that it says of the others.
    embedding_bits, head_bits: 16 and 32 are floats; None is the scheme's default. max_memory: bytes. calibration:
    text or records (`model_text`), None for the text that ships; calibration_samples windows of calibration_length
    tokens are read from it, and run on the device. adapter: PEFT directories, whose sum is merged as `merge` says,
    or which stay beside the weights to be switched at run time if they have names; a compile fails where less than
    min_survival is left in a linear. layers: rules that give linears other widths than the scheme's, the last that
    matches counts; bits_budget: the mean of the bits of all linears of the blocks, which those without a rule fill.
    given: the options that were asked for by name, which what an adapter brings along does not replace. widths:
    what rules and budget come to, by weight name, once the model is known; clips: the ratios that were searched, by
    weight name, once its frame is.
    """

    target: str = "onnx"
    scheme: Scheme = SCHEMES["w4a8"]
    group_size: int = 32
    symmetric: bool = True
    clip: Literal["none", "mse"] = "mse"
    method: str = "rtn"
    compensate: str = "none"
    compensate_rank: int | None = None
    compensate_budget: float | None = None
    sparsity: str = "none"
    prune: str = "wanda"
    layers: tuple[LayerRule, ...] = ()
    bits_budget: float | None = None
    activation_symmetric: bool = True
    activation_clip: float | Literal["auto"] = 1.0
    rotate: Literal["auto"] | frozenset[str] = "auto"
    rotation_seed: int = 0
    hadamard: str = "full"
    rotation_file: RotationFile | None = None
    kv_cache: str = "float"
    tied: str = "keep"
    embedding_bits: int | None = None
    head_bits: int | None = None
    max_memory: int | None = None
    calibration: Path | None = None
    calibration_samples: int = 64
    calibration_length: int = 512
    device: str = "cpu"
    adapter: tuple[AdapterSource, ...] = ()
    merge: str = "auto"
    min_survival: float = 0.5
    dtype: str | None = None
    sm: tuple[int, ...] = ()
    profile: Profile | None = None
    portable: bool = False
    positive: bool = field(default=False, compare=False, repr=False)
    widths: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    clips: Mapping[str, float] = field(default_factory=dict, compare=False, repr=False)
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def __post_init__(self) -> None:
        one_of("target", self.target, TARGETS, TargetError)
        one_of("group_size", self.group_size, GROUP_SIZES, SchemeError)
        one_of("clip", self.clip, CLIPS, SchemeError)
        one_of("method", self.method, METHODS, SchemeError)
        one_of("kv_cache", self.kv_cache, KV_CACHES, SchemeError)
        one_of("tied", self.tied, TIED, SchemeError)
        one_of("hadamard", self.hadamard, KINDS, RotationError)
        one_of("merge", self.merge, MERGES, SchemeError)
        one_of("device", self.device, DEVICES, InputError)
        if self.dtype is not None:
            one_of("dtype", self.dtype, DTYPES, SchemeError)
        if not self.adapter or self.stated("scheme"):  # else an adapter may bring another
            self.check_activations()
        self._check_grid()
        check_budget(self.scheme, self.layers, self.bits_budget)
        check_compensation(self)
        check_floats(self)
        if not -math.inf < self.min_survival <= 1:
            raise InputError(f"min_survival is {self.min_survival}", hint="a share up to 1, such as 0.5")
        if not self.adapter and (self.merge, self.min_survival) != ("auto", 0.5):
            raise InputError("merge and min_survival are for an adapter, and none is named", hint="--adapter DIR")
        if self.switchable and self.merge not in ("auto", "branch"):
            raise SchemeError(
                f"--merge {self.merge} for adapters with names, which stay beside the weights to be switched",
                hint="--merge branch, or --adapter DIR without a name",
            )
        for name in ("embedding_bits", "head_bits"):
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), TABLE_BITS, SchemeError)
        for name, least in (("rotation_seed", 0), ("calibration_samples", 1), ("calibration_length", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}", hint=f"{name} is {least} or more")
        if self.max_memory is not None and self.max_memory < 1:
            raise InputError(f"max_memory is {self.max_memory}", hint="a size such as 4GiB or 512MiB")
        if self.rotate != "auto":
            Rotation(self.rotate, self.hadamard, self.rotation_seed)  # raises RotationError for unknown sites

    def _check_grid(self) -> None:
        """Raise SchemeError for a grid that was asked for where nothing is rounded."""
        tables = [bits for bits in (self.embedding_bits, self.head_bits) if bits is not None and bits < 16]
        asked = [name for name in ("group_size", "symmetric", "clip") if name in self.given]
        if asked and not tables and not self.scheme.quantized:
            raise SchemeError(
                f"{' and '.join(asked)} with --scheme {self.scheme}, which rounds no weights",
                hint="--scheme w4a16, or leave them out",
            )

    def check_activations(self) -> None:
        """Raise an RqcError for a grid of activations that the scheme does not have on its target."""
        clip = self.activation_clip
        if clip != "auto" and not 0 < clip <= 1:
            raise InputError(f"activation_clip is {clip}", hint="auto, or a ratio above 0 and up to 1, such as 0.9")
        if self.activation_symmetric and clip == 1:
            return
        asked = "--activation-asymmetric" if not self.activation_symmetric else f"--activation-clip {clip}"
        near = "w6a6" if self.scheme.weight_bits == 8 else "w4a4"
        if not self.scheme.quantizes_activations:
            raise SchemeError(
                f"{asked} with --scheme {self.scheme}, which leaves activations in floats",
                hint=f"--scheme {near}, or leave it out",
            )
        if self.scheme.activation_bits == 8 and self.target == "onnx":
            raise SchemeError(
                f"{asked} with --scheme {self.scheme} on onnx: the kernel (MatMulNBits) rounds activations by itself, "
                "symmetric and without clipping",
                hint=f"--scheme {near}, or leave it out",
            )
        if self.scheme.name == "w8a8":
            raise SchemeError(
                f"{asked} with --scheme {self.scheme} on {self.target}, whose activations have static scales",
                hint="--scheme w4a8 or w6a6, or leave it out",
            )

    def stated(self, name: str) -> bool:
        """Whether an option was asked for: by name, or with another value than the default."""
        default = next(field.default for field in fields(self) if field.name == name)
        return name in self.given or getattr(self, name) != default

    @property
    def builds(self) -> bool:
        """Whether the compile builds a plan."""
        return self.target != "onnx" and not self.portable

    @property
    def switchable(self) -> bool:
        """Whether the adapters are to be chosen from at run time."""
        return any(source.name is not None for source in self.adapter)

    @property
    def rotation(self) -> Rotation | None:
        """The rotation asked for, which may have no sites; None where it is chosen by measurement (`auto`)."""
        if self.rotate == "auto":
            return None
        learned = None if self.rotation_file is None else self.rotation_file.rotation.learned
        return Rotation(self.rotate, self.hadamard, self.rotation_seed, learned)

    def table_bits(self, *, tied: bool) -> tuple[int, int]:
        """(embedding, head) bits of a model whose two tables are `tied` or not; 16 and 32 are floats.

        Tied tables that are kept as one have one width: the one given holds for both, two different ones raise
        SchemeError.
        """
        default = 8 if self.scheme.quantized else self.scheme.weight_bits
        embedding, head = self.embedding_bits, self.head_bits
        if tied and self.tied == "keep":
            if embedding is not None and head is not None and embedding != head:
                raise SchemeError(
                    f"embedding_bits {embedding} and head_bits {head} for one tied table",
                    hint="give both the same value, or --tied untie",
                )
            embedding = head = embedding if embedding is not None else head
        return (embedding if embedding is not None else default, head if head is not None else default)

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain values, readable by `from_values`."""
        without = {"rotation_file"} | (set() if self.sparsity != "none" else {"prune"})
        unturned = self.rotate == frozenset() or self.rotation_file is not None  # which brings them along
        without |= {"rotation_seed", "hadamard"} if unturned else set()
        plain = {name: getattr(self, name) for name in option_names() if name not in without}
        rotate = "auto" if self.rotate == "auto" else ",".join(sorted(self.rotate)) or "none"
        return {
            **{name: value for name, value in plain.items() if value is not None and value != ()},
            **({} if self.profile is None else {"profile": str(self.profile)}),
            **({"sm": list(self.sm)} if self.sm else {}),
            **({"layers": [rule.to_json() for rule in self.layers]} if self.layers else {}),
            "scheme": self.scheme.name,
            "rotate": rotate,
            **({} if self.calibration is None else {"calibration": str(self.calibration)}),
            **({"adapter": [str(source) for source in self.adapter]} if self.adapter else {}),
            **({} if self.rotation_file is None else {"rotation": str(self.rotation_file.path)}),
        }

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from values by name (keyword arguments, flags, a parsed file); a value of None is the default.

        Raises InputError for an unknown name, with the nearest known one, and for a value of the wrong type.
        """
        parsed = parsed_values(values, option_names(), "a compile", _parse)
        return cls(**{**parsed, **rotation_values(parsed)}, given=frozenset(parsed))

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """The recipe in a TOML file. Raises InputError naming file and key."""
        return cls.layered(Path(path), {})

    @classmethod
    def layered(cls, path: Path | None, flags: Mapping[str, Any]) -> Recipe:
        """Flags (None: not given) over the recipe file (None: no file) over the defaults."""
        given = by_field({name: value for name, value in flags.items() if value is not None})
        if path is None:
            return cls.from_values(given)
        values = _read_toml(path)
        try:
            cls.from_values(values)  # the file's own mistakes, even where a flag would hide them
        except RqcError as error:
            raise type(error)(f"{path}: {error.message}", hint=error.hint) from error
        values = by_field(values)
        if "rotate" in given and not _parse_rotate(given["rotate"]):
            values = {key: value for key, value in values.items() if key not in ("rotation_seed", "hadamard")}
        return cls.from_values({**values, **given})


def option_names() -> list[str]:
    """The names of all options: the fields of a recipe but what is derived."""
    return [field.name for field in fields(Recipe) if field.name not in DERIVED]


def parse_size(text: str) -> int:
    """Bytes of a size such as 4GiB, 1.5 GB, 512MiB or 1048576. Raises InputError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", text, re.IGNORECASE)
    if not found:
        raise InputError(f"{text!r} is no size", hint="a size is a number and a unit, such as 4GiB, 512MiB or 8GB")
    number, unit, binary = found.groups()
    power = "kmgt".index(unit.lower()) + 1 if unit else 0
    size = float(number) * (1024 if binary else 1000) ** power
    if size == math.inf:
        raise InputError(f"{text[:40]!r} is no size", hint="a size such as 4GiB or 512MiB")
    return int(size)


def _parse(name: str, value: Any) -> Any:
    """`value` as the field `name` holds it. Raises the field's RqcError."""
    if name == "scheme":
        return value if isinstance(value, Scheme) else Scheme.parse(typed(name, value, str))
    if name == "rotate":
        return _parse_rotate(value)
    if name == "max_memory":
        return parse_size(value) if isinstance(value, str) else typed(name, value, int)
    if name == "calibration":
        return Path(typed(name, value, PATH))
    if name == "rotation_file":
        return value if isinstance(value, RotationFile) else RotationFile.read(typed("rotation", value, PATH))
    if name == "adapter":
        return parse_sources(value)
    if name == "profile":
        return value if isinstance(value, Profile) else Profile.parse(typed(name, value, str))
    if name == "sm":
        return parse_sms(value)
    if name == "activation_clip":
        return _parse_clip(value)
    if name in ("symmetric", "activation_symmetric", "portable"):
        return typed(name, value, bool)
    if name == "layers":
        return parse_rules(value)
    if name in ("min_survival", "bits_budget", "compensate_budget"):
        return float(typed(name, value, NUMBER))
    return typed(name, value, str if name in TEXTS else int)


def _parse_clip(value: Any) -> float | Literal["auto"]:
    """'auto', or a ratio as a number or its text."""
    if not isinstance(value, str):
        return float(typed("activation_clip", value, NUMBER))
    if value.strip() == "auto":
        return "auto"
    try:
        return float(value)
    except ValueError:
        raise InputError(f"activation_clip is {value!r}", hint="auto, or a ratio such as 0.9") from None


def _parse_rotate(value: Any) -> Literal["auto"] | frozenset[str]:
    """'auto', 'none', 'r1,r4', or names in a list."""
    if isinstance(value, str) and value.strip() == "auto":
        return "auto"
    names = site_names(value, "auto", "none")
    if names != ["none"] and (unknown := [name for name in names if name not in SITES]):
        raise RotationError(f"unknown rotation {unknown[0]!r}", hint=f"auto, none, or a list of {', '.join(SITES)}")
    return Rotation.parse(names).sites


def _read_toml(path: Path) -> dict[str, Any]:
    """The file's keys; relative paths start from the file's folder."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the recipe {path} cannot be read: {error.strerror}", hint="name a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"the recipe {path} is not valid TOML: {error}", hint='lines such as scheme = "w4a16"'
        ) from error
    for name in ("calibration", "rotation"):
        if isinstance(values.get(name), str):
            values[name] = str(path.parent / values[name])
    if "adapter" in values:
        values["adapter"] = _sources_in(path, values["adapter"])
    return values


def _sources_in(path: Path, value: Any) -> tuple[AdapterSource, ...]:
    """The adapters that a recipe file names. Raises InputError naming the file."""
    try:
        return tuple(source.under(path.parent) for source in parse_sources(value))
    except InputError as error:
        raise InputError(f"{path}: {error.message}", hint=error.hint) from error
