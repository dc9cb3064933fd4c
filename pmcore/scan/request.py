"""One PAGEMAP_SCAN request: `struct pm_scan_arg` as a value."""

from __future__ import annotations

import attrs

from pmcore.errors import ArgumentError
from pmcore.uapi import PM_SCAN_ARG_BYTES

__all__ = ["ScanRequest"]


def _word(_instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise ArgumentError(f"{attribute.name}={value!r} is not an unsigned 64-bit number")


@attrs.frozen(kw_only=True)
class ScanRequest:
    """What to scan, which pages to select, what to report.

    Any 64-bit value is accepted here, also ones that the kernel refuses: refusing is the kernel's business
    (`pmcore.scan.validate`), and both backends do it alike. Addresses in bytes. Raises ArgumentError for a value
    that does not fit the field.
    """

    start: int = attrs.field(validator=_word)
    end: int = attrs.field(validator=_word)
    #: Room for that many regions; 0 with `vec` False asks for no output at all.
    vec_len: int = attrs.field(default=0, validator=_word)
    #: Whether `vec` points somewhere; default: it does if there is room for a region.
    vec: bool = attrs.field()
    max_pages: int = attrs.field(default=0, validator=_word)
    flags: int = attrs.field(default=0, validator=_word)
    category_inverted: int = attrs.field(default=0, validator=_word)
    category_mask: int = attrs.field(default=0, validator=_word)
    category_anyof_mask: int = attrs.field(default=0, validator=_word)
    return_mask: int = attrs.field(default=0, validator=_word)
    size: int = attrs.field(default=PM_SCAN_ARG_BYTES, validator=_word)

    @vec.default
    def _vec_follows_vec_len(self) -> bool:
        return self.vec_len > 0
