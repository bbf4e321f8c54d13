"""Quantities as people write them: 500MB, 300Mbit, 5ms."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

SIZES = {"MB": 1e6, "GB": 1e9, "MiB": float(1 << 20), "GiB": float(1 << 30)}  # bytes
RATES = {"Mbit": 1e6 / 8, "Gbit": 1e9 / 8} | SIZES  # bytes/s
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
COUNTS = {"M": 1e6, "G": 1e9}


def quantity(text: str, units: Mapping[str, float]) -> float:
    """A positive number with one of these units. Raises ValueError that names them."""
    number = text.rstrip("GMKibtBmsu")
    unit = text[len(number) :]
    if unit not in units or not number.replace(".", "", 1).isdigit() or not float(number):
        raise ValueError(f"{text!r} is not a number above 0 with one of {', '.join(units)}")
    return float(number) * units[unit]
