"""One measured number and the bound that it must keep."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Measured:
    """A difference between two ways to compute the same.

    Attributes:
      name: what was compared.
      value: the largest difference; None where this machine has nothing to compare.
      bound: that it must not exceed.
      note: a circumstance, or the error that ended the check.
    """

    name: str
    value: float | None
    bound: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the bound is kept; NaN does not keep it."""
        if self.value is None:
            return True
        return self.value <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: no NaN and no infinities, which are null."""
        known = self.value is not None and math.isfinite(self.value)
        value = self.value if known else None
        return {**asdict(self), "value": value, "passed": self.passed}

    def __str__(self) -> str:
        if self.value is None:
            return f"-     {self.name}: {self.note}"
        mark = "ok   " if self.passed else "WRONG"
        note = f" ({self.note})" if self.note else ""
        return f"{mark} {self.name}: {self.value:.1e}, at most {self.bound:.0e}{note}"
