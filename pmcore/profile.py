"""Kernel profiles: what a kernel can do and which quirks it has, as one value.

Logic asks `profile.has("scan.guard")`, never for a version. A version name is a preset of capabilities, built here
from `spec/tables/features.toml`, the only place in the project where versions are compared; a backend that talks to
a running kernel starts from the preset and corrects it by trying (`KernelProfile.changed`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

import attrs

from pmcore import spec
from pmcore.errors import UnknownCapability
from pmcore.geometry import X86_64, Geometry

__all__ = ["REFERENCE_VERSION", "KernelProfile", "preset", "profile_from_row", "profile_row"]

#: The version whose document the project implements.
REFERENCE_VERSION = "6.12"


@attrs.frozen(kw_only=True)
class KernelProfile:
    """A set of named capabilities and quirks, with the geometry that goes with them."""

    name: str
    capabilities: frozenset[str]
    config: frozenset[str] = frozenset()
    geometry: Geometry = X86_64
    arch: str = "x86_64"

    def has(self, capability: str) -> bool:
        """Whether the kernel has `capability` (or quirk). Raises UnknownCapability for a name not in spec/."""
        if capability in self.capabilities:
            return True
        if capability not in spec.features():
            _check_known((capability,))
        return False

    def changed(
        self, *, name: str | None = None, add: Iterable[str] = (), remove: Iterable[str] = ()
    ) -> KernelProfile:
        """This profile with capabilities added and removed. Raises UnknownCapability for unknown names."""
        add, remove = frozenset(add), frozenset(remove)
        _check_known(add | remove)
        return attrs.evolve(
            self, name=self.name if name is None else name, capabilities=(self.capabilities | add) - remove
        )


def preset(
    version: str = REFERENCE_VERSION,
    *,
    config: Iterable[str] = (),
    arch: str = "x86_64",
    geometry: Geometry | None = None,
) -> KernelProfile:
    """The profile of an unmodified kernel of `version` ("6.12", "6.12.117-1-amd64": the rest is ignored).

    `config` changes the typical configuration that `spec/` assumes: "CONFIG_KSM" sets an option, "!CONFIG_KSM"
    unsets it. Raises UnknownCapability for a version before 2.6.25, one that is none, or an unknown option.
    """
    return _preset(_release(version), frozenset(config), arch, geometry or X86_64)


@functools.lru_cache(maxsize=256)
def _preset(version: str, config: frozenset[str], arch: str, geometry: Geometry) -> KernelProfile:
    options = set(spec.default_config())
    known = options | {option.removeprefix("!") for row in spec.features().values() for option in row.config}
    for option in sorted(config):
        bare = option.removeprefix("!")
        if bare not in known:
            raise UnknownCapability(
                f"no capability depends on {bare}; those known: {', '.join(sorted(known))}"
            )
        (options.discard if option.startswith("!") else options.add)(bare)
    capabilities = frozenset(
        row.name
        for row in spec.features().values()
        if spec.version_in(version, row.since, row.until)
        and all((o[1:] not in options) if o.startswith("!") else (o in options) for o in row.config)
        and (not row.arch or arch in row.arch)
    )
    return KernelProfile(
        name=version, capabilities=capabilities, config=frozenset(options), geometry=geometry, arch=arch
    )


def profile_row(profile: KernelProfile) -> dict[str, Any]:
    """The profile as values that JSON can hold: by what it differs from its version's preset, if it names one.

    So a capability that is written down later is told by the version, also for profiles kept before.
    """
    row: dict[str, Any] = {
        "name": profile.name,
        "preset": None,
        "config": sorted(profile.config),
        "arch": profile.arch,
        "geometry": attrs.asdict(profile.geometry),
    }
    try:
        row["preset"] = _release(profile.name)
        plain = _preset_of(row).capabilities
    except UnknownCapability:
        row["preset"], plain = None, frozenset()
    row["add"], row["remove"] = sorted(profile.capabilities - plain), sorted(plain - profile.capabilities)
    return row


def profile_from_row(row: Any) -> KernelProfile:
    """The profile of `profile_row`; capabilities that are not known here are left out.

    Raises UnknownCapability, or TypeError, ValueError, LookupError for what is no such row.
    """
    known = spec.features().keys()
    base = _preset_of(row).capabilities if row["preset"] is not None else frozenset()
    return KernelProfile(
        name=str(row["name"])[:80],
        capabilities=(base | known & set(row["add"])) - set(row["remove"]),
        config=frozenset(map(str, row["config"])),
        arch=str(row["arch"])[:80],
        geometry=_geometry(row["geometry"]),
    )


def _geometry(row: Any) -> Geometry:
    return Geometry(page_shift=row["page_shift"], levels=row["levels"], task_size=row["task_size"])


def _preset_of(row: Any) -> KernelProfile:
    """The preset of the row's version, with its configuration; options that no capability depends on are left out."""
    known = set(spec.default_config()) | {
        option.removeprefix("!") for feature in spec.features().values() for option in feature.config
    }
    there = known & set(row["config"])
    config = there | {f"!{option}" for option in known - there}
    return preset(
        str(row["preset"]), config=config, arch=str(row["arch"]), geometry=_geometry(row["geometry"])
    )


def _release(version: str) -> str:
    """The mainline release that `version` names: "6.12.117-1" is 6.12, "2.6.32-5" is 2.6.32."""
    match = re.fullmatch(
        r"(2\.6\.\d{1,3}|[3-9]\.\d{1,3}|[1-9]\d\.\d{1,3})(?:[.\-+~_ ].*)?", version.strip(), re.DOTALL
    )
    if match is None:
        raise UnknownCapability(
            f"{version[:80]!r} names no kernel version that pmcore knows; use one like 6.12 or 2.6.32"
        )
    known = [row.version for row in spec.kernels()]
    if match[1] not in known:
        raise UnknownCapability(
            f"{match[1]} is no release that pmcore knows: {known[0]}, the first with /proc/PID/pagemap, to {known[-1]}"
        )
    return match[1]


def _check_known(names: Iterable[str]) -> None:
    unknown = sorted(set(names) - spec.features().keys())
    if unknown:
        raise UnknownCapability(f"spec/tables/features.toml has no {', '.join(unknown)}")
