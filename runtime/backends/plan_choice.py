"""Which TensorRT plan of an engine runs on this machine, or in a few words why none does."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rqc.runtime.backends.cuda import Device, open_cuda
from rqc.runtime.errors import TargetError

FLAVOURS = {"tensorrt-rtx": ("tensorrt_rtx", "TensorRT-RTX"), "tensorrt": ("tensorrt", "TensorRT")}
"""Of each flavour, the Python module that runs its plans and the product's name."""


@dataclass(frozen=True)
class Plan:
    """One record of the manifest's "plans": a plan is bound to its module's version and to compute capabilities.

    sms () leaves those to the module: standard TensorRT, which loads a plan only on a GPU like the one that built it.
    """

    name: str
    entry: str
    flavour: str
    version: str
    sms: tuple[int, ...]
    batch: tuple[int, int, int]
    prompt: tuple[int, int, int]
    context: int
    verified: bool = False
    reason: str = ""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Plan:
        """A record that `check_manifest` has passed."""
        profile = record["profile"]
        return cls(
            name=record["name"],
            entry=record["entry"],
            flavour=record["flavour"],
            version=record["version"],
            sms=tuple(record["sms"]),
            batch=tuple(profile["batch"]),
            prompt=tuple(profile["prompt"]),
            context=profile["context"],
            verified=record.get("verified", False),
            reason=record.get("reason") or "",
        )

    @property
    def label(self) -> str:
        """The plan for a person, such as "TensorRT-RTX plan (SM 80, 86)"."""
        made_for = f" (SM {', '.join(map(str, self.sms))})" if self.sms else ""
        return f"{FLAVOURS[self.flavour][1]} plan{made_for}"

    def check_profile(self) -> None:
        """Raise TargetError for ranges that leave out what the runtime does: one row, and the last tokens of a
        prompt."""
        for what, least in (("rows", self.batch[0]), ("tokens of a prompt", self.prompt[0])):
            if least > 1:
                raise TargetError(
                    f"the plan {self.name} takes no less than {least} {what}", hint="build it with a profile from 1 up"
                )


@dataclass(frozen=True)
class Chosen:
    """A plan, the module that runs it and the GPU that it runs on."""

    plan: Plan
    module: Any
    device: Device


Importer = Callable[[str], Any]
Finder = Callable[[], "Device | str"]


def plans_of(manifest: Mapping[str, Any]) -> list[Plan]:
    """The plans that the manifest lists, in its order."""
    return [Plan.of(record) for record in manifest.get("plans") or []]


def import_module(name: str) -> Any:
    """A module of NVIDIA's by name. Raises TargetError where it is there and does not load."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise TargetError(f"the module {name} does not load ({error})", hint=f"install {name} again") from error
        raise
    except (ImportError, OSError) as error:
        raise TargetError(f"the module {name} does not load ({error})", hint=f"install {name} again") from error


def choose(
    plans: Sequence[Plan], *, importer: Importer = import_module, find_device: Finder = open_cuda
) -> Chosen | list[str]:
    """The first plan that runs here, or of each why it does not."""
    device = find_device()
    if isinstance(device, str):
        return [device for _ in plans]
    reasons = []
    for plan in plans:
        try:
            return Chosen(plan, _module(plan, device, importer), device)
        except TargetError as error:
            reasons.append(error.message)
    return reasons


def _module(plan: Plan, device: Device, importer: Importer) -> Any:
    """The module that runs this plan on this GPU. Raises TargetError, saying in a few words why it does not run."""
    if plan.sms and device.sm not in plan.sms:
        raise TargetError(f"the GPU ({device.name}) is SM {device.sm}")
    plan.check_profile()
    name = FLAVOURS[plan.flavour][0]
    try:
        module = importer(name)
    except ModuleNotFoundError:
        raise TargetError(f"the Python module {name} is not installed") from None
    found = str(getattr(module, "__version__", "of an unknown version"))
    if found != plan.version:
        raise TargetError(f"{name} is {found}, and a plan runs on the version that built it, {plan.version}")
    return module
