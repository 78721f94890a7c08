"""To which widths token arrays are padded: each width is a program to compile."""

from __future__ import annotations

import numpy as np

_NARROWEST = 64
"""Widths are not told apart below this: a compilation costs more than the padding."""


def fit_width(longest: int, limit: int) -> int:
    """The width to pad to: `limit`, halved as often as `longest` tokens still fit.

    Padding is less than the tokens, and a run meets few widths.

    >>> [fit_width(n, 1024) for n in (3, 100, 300, 600)], fit_width(3, 50)
    ([64, 128, 512, 1024], 50)
    """
    width = limit
    while (half := -(-width // 16) * 8) < width and longest <= half >= _NARROWEST:
        width = half
    return width


def pad_left(x: np.ndarray, width: int) -> np.ndarray:
    """The last `width` columns of ``[P, S]``; zeros before them where S is less."""
    return np.pad(x, ((0, 0), (max(0, width - x.shape[1]), 0)))[:, -width:]
