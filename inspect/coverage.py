"""How the inspected share of a strip is told."""

import math


def in_percent(coverage: float) -> str:
    """A share from 0 to 1 as per cent with two digits, rounded down: 99.996 never reads as 100."""
    return f"{math.floor(coverage * 10_000 + 1e-9) / 100:.2f}"
