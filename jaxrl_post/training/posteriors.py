"""The success rates of a task's questions, as their earlier visits showed them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxrl_post.recipes.groups import Groups


class Posteriors:
    """What earlier visits of prompts showed, for recipes that remember them.

    A round may draw a prompt twice, where an epoch ends: the past then fades once, and
    both groups count.
    """

    def __init__(
        self,
        posterior: np.ndarray | None,
        rows: Mapping[str, int],
        discount: float | None,
    ) -> None:
        """Takes the posteriors as they are before a step.

        Args:
          posterior: ``[R, 2]`` float64, or None where nothing is remembered.
          rows: of the R questions, by id.
          discount: weight of the past at a visit.
        """
        self.after = None if posterior is None else posterior.copy()
        self._rows, self._discount = rows, discount

    def before(self, ids: Sequence[str]) -> np.ndarray | None:
        """``[P, 2]``, faded towards the uniform prior."""
        if self.after is None or self._discount is None:
            return None
        rows = [self._rows[name] for name in ids]
        self._faded = self.after.copy()
        self._faded[rows] = 1 + self._discount * (self.after[rows] - 1)
        return self._faded[rows]

    def keep(self, groups: Groups) -> None:
        """Remembers what a transform made of them."""
        if self.after is not None and groups.posterior is not None:
            rows = [self._rows[name] for name in groups.prompts.ids]
            self.after[rows] = self._faded[rows]
            np.add.at(self.after, rows, groups.posterior - self._faded[rows])
