"""Compute capabilities (SM): which a plan can be built for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from rqc.runtime.errors import InputError, TargetError

SMS = (75, 80, 86, 89, 120, 121)
"""What TensorRT-RTX 1.7 builds for."""
DEFAULT_SMS = (80, 86, 89, 120)
LEAST_SM = {"int4": 80, "fp8": 89, "fp4": 120}
"""By how weights are stored: the least that TensorRT-RTX builds for."""
LEAST_GPU = {"fp8": 89, "fp4": 100}
"""The same of TensorRT: Ada and Blackwell are the first with such arithmetic."""
STORED = {"int4": "4-bit weights", "fp8": "8-bit float weights", "fp4": "4-bit float weights"}
"""The same in words."""
KINDS = {"fp8": "fp8", "nvfp4": "fp4"}
"""How weights of small floats are stored, by what a manifest calls them."""
DEVICE_WAY = "--target tensorrt --portable here, then `rqc build ENGINE --target tensorrt` on the device"


def parse_sms(value: Any) -> tuple[int, ...]:
    """86, '86,89' or a list of them; 8.6 is 86, as the vendor writes it. Raises InputError."""
    words = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    found = [re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", str(word).strip().lower()) for word in words]
    if not words or not all(found):
        raise InputError(f"sm is {value!r}", hint="compute capabilities such as 86,89,120")
    return tuple(sorted({int(match[1] + match[2]) for match in found if match}))


def weight_kinds(manifest: Mapping[str, Any]) -> frozenset[str]:
    """How an engine stores weights, of what not every GPU computes with."""
    int4 = any(layer.get("storage_bits", 32) <= 4 for layer in manifest.get("layers", []))
    weights = manifest.get("weights")
    return frozenset(({"int4"} if int4 else set()) | ({KINDS[weights]} if weights in KINDS else set()))


def checked_sms(flavour: str, sms: tuple[int, ...], kinds: Collection[str]) -> tuple[int, ...]:
    """The compute capabilities to build for, all usual ones that have such weights if none is named. kinds: how weights
    are stored.

    Raises TargetError naming each that cannot be. Standard TensorRT builds for the GPU that it runs on and no other.
    """
    if found := sm_obstacles(flavour, sms, kinds):
        raise TargetError("; ".join(said for said, _ in found), hint="; ".join(way for _, way in found))
    return () if flavour == "tensorrt" else sms or default_sms(kinds)


def default_sms(kinds: Collection[str]) -> tuple[int, ...]:
    """The usual compute capabilities that compute with weights stored so."""
    return tuple(sm for sm in DEFAULT_SMS if all(sm >= LEAST_SM[kind] for kind in kinds))


def sm_obstacles(flavour: str, sms: tuple[int, ...], kinds: Collection[str]) -> list[tuple[str, str]]:
    """(what stands against these compute capabilities, way out), each once."""
    if flavour == "tensorrt":
        return [("--sm with --target tensorrt, which builds for the GPU at hand", "leave --sm out")] if sms else []
    found = []
    if unknown := [sm for sm in sms if sm not in SMS]:
        found.append((f"TensorRT-RTX does not build for {_told(unknown)}, only for {_told(SMS)}", DEVICE_WAY))
    open_ = [sm for sm in sms if sm in SMS]
    for kind in sorted(kinds, key=LEAST_SM.__getitem__, reverse=True):
        if old := [sm for sm in open_ if sm < LEAST_SM[kind]]:
            found.append((f"TensorRT-RTX has no {STORED[kind]} on {_told(old)}", _way(kind)))
        open_ = [sm for sm in open_ if sm not in old]
    return found


def check_gpu(sm: int, kinds: Collection[str]) -> None:
    """Raise TargetError for a GPU that TensorRT has no such weights on."""
    for kind in kinds:
        if sm < LEAST_GPU.get(kind, 0):
            raise TargetError(
                f"TensorRT has {STORED[kind]} from SM {LEAST_GPU[kind]} on, the GPU is SM {sm}", hint=_way(kind)
            )


def _way(kind: str) -> str:
    if kind == "int4":
        return f"--scheme w8a16, without tables of 4 bits; or {DEVICE_WAY}"
    sms = ",".join(map(str, default_sms([kind])))
    return f"--sm {sms}, or --scheme {'w8a16' if kind == 'fp8' else 'w4a16'}, which older ones have"


def _told(sms: tuple[int, ...] | list[int]) -> str:
    return ", ".join(f"SM {sm}" for sm in sms)
