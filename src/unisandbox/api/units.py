"""Sizes as people write them, parsed once at the door."""

from __future__ import annotations

import re
from typing import Final

from unisandbox.api.errors import InvalidArgumentError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

_SIZE: Final = re.compile(r"(\d{1,20})(?:\.(\d{1,20}))?\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_FACTOR: Final = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}
_LIMIT: Final = 1 << 62


def parse_size(value: int | str, what: str = "size", *, least: int = 1) -> int:
    """Bytes of 4096, "512M", "1.5GiB". Factors are powers of 1024, as Docker's are.

    Raises:
        InvalidArgumentError: it is not a size, or below `least` (1: nothing is no size; or 0).
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InvalidArgumentError(f"{what} must be bytes or a string like '512M', got {value!r}")
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise InvalidArgumentError(f"{what} must be bytes or a string like '512M', got {value!r}")
        whole, fraction = match[1], match[2] or ""
        value = int(int(whole + fraction) * _FACTOR[match[3].upper()] // 10 ** len(fraction))
    if not least <= value <= _LIMIT:
        bound = "> 0" if least else ">= 0"
        raise InvalidArgumentError(f"{what} must be {bound} and at most 2**62 bytes, got {value}")
    return value
