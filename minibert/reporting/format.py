"""Numbers and names as people read them."""

from __future__ import annotations

import math


def fixed(value: float | None, digits: int = 4) -> str:
    """A metric with so many decimals; a dash where it is undefined."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def compact(value: float) -> str:
    """A number in little room, as on an axis: 1500, 25k, 0.05, 5e-5."""
    if abs(value) >= 1e10:
        return f"{value:.3g}".replace("e+", "e")
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:.4g}"


def shorten(text: object, length: int) -> str:
    """At most `length` characters, the last one an ellipsis where something was cut."""
    text = str(text)
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
