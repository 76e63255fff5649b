"""95% intervals of accuracies: no figure without one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964
"""Half width of a 95% interval in standard errors of a normal distribution."""


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's interval of the accuracy right / n (Wilson 1927); good near 0 and 1 and for small n."""
    accuracy = right / n
    middle = (accuracy + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(accuracy * (1 - accuracy) / n + Z * Z / (4 * n * n))
    # At the ends the rounding of middle and half would leave a bound just beside 0 or 1.
    return 0.0 if right == 0 else middle - half, 1.0 if right == n else middle + half


def centred_mean(measured: Sequence[tuple[float, int, float]]) -> tuple[float, float, float]:
    """(mean, lo, hi) over tasks (accuracy, n, that of guessing), each centred so that guessing is 0 and perfect 1."""
    values = [(accuracy - chance) / (1 - chance) for accuracy, _, chance in measured]
    variance = sum(accuracy * (1 - accuracy) / n / (1 - chance) ** 2 for accuracy, n, chance in measured)
    mean, half = sum(values) / len(values), Z * math.sqrt(variance) / len(values)
    return mean, mean - half, mean + half


def paired_interval(a: Sequence[int], b: Sequence[int]) -> tuple[float, float, float]:
    """(mean, lo, hi): b - a on the same examples and its 95% interval. Raises ValueError for different lengths."""
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} and {len(b)} results cannot be compared in pairs")
    difference = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    mean = float(difference.mean())
    half = Z * float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return mean, mean - half, mean + half
