"""Compute capabilities (SM): which a plan can be built for."""

from __future__ import annotations

import re
from typing import Any

from rqc.runtime.errors import InputError, TargetError

SMS = (75, 80, 86, 89, 120, 121)
"""What TensorRT-RTX 1.7 builds for."""
DEFAULT_SMS = (80, 86, 89, 120)
LEAST_SM_OF_INT4 = 80
DEVICE_WAY = "--target tensorrt --portable here, then `rqc build ENGINE --target tensorrt` on the device"


def parse_sms(value: Any) -> tuple[int, ...]:
    """86, '86,89' or a list of them; 8.6 is 86, as the vendor writes it. Raises InputError."""
    words = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    found = [re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", str(word).strip().lower()) for word in words]
    if not words or not all(found):
        raise InputError(f"sm is {value!r}", hint="compute capabilities such as 86,89,120")
    return tuple(sorted({int(match[1] + match[2]) for match in found if match}))


def checked_sms(flavour: str, sms: tuple[int, ...], *, int4: bool) -> tuple[int, ...]:
    """The compute capabilities to build for, all usual ones if none is named. int4: whether weights are stored so.

    Raises TargetError naming each that cannot be. Standard TensorRT builds for the GPU that it runs on and no other.
    """
    if found := sm_obstacles(flavour, sms, int4=int4):
        raise TargetError("; ".join(said for said, _ in found), hint="; ".join(way for _, way in found))
    return () if flavour == "tensorrt" else sms or DEFAULT_SMS


def sm_obstacles(flavour: str, sms: tuple[int, ...], *, int4: bool) -> list[tuple[str, str]]:
    """(what stands against these compute capabilities, way out), each."""
    if flavour == "tensorrt":
        return [("--sm with --target tensorrt, which builds for the GPU at hand", "leave --sm out")] if sms else []
    unknown = [sm for sm in sms if sm not in SMS]
    old = [sm for sm in sms if sm in SMS and sm < LEAST_SM_OF_INT4 and int4]
    found = []
    if unknown:
        found.append((f"TensorRT-RTX does not build for {_told(unknown)}, only for {_told(SMS)}", DEVICE_WAY))
    if old:
        way = "--scheme w8a16, without tables of 4 bits"
        found.append((f"TensorRT-RTX has no 4-bit weights on {_told(old)}", f"{way}; or {DEVICE_WAY}"))
    return found


def _told(sms: tuple[int, ...] | list[int]) -> str:
    return ", ".join(f"SM {sm}" for sm in sms)
