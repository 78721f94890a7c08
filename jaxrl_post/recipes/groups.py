"""Judged groups of rollouts on the host, before they become a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxrl_post.types import Prompts, Verdict


@dataclass(frozen=True)
class Groups:
    """P questions with G judged completions each; NumPy arrays.

    Attributes:
      prompts: the questions.
      contexts, context_mask: ``[P, S]`` int32 and bool, the tokenised questions.
      tokens: ``[P, G, T]`` int32; mask: ``[P, G, T]`` bool, True up to and including
        the stop token.
      sampler_logps: ``[P, G, T]`` float32, under the distribution sampled from.
      stopped: ``[P, G]`` bool, False where the length limit cut the completion.
      completions: P rows of G texts.
      verdicts: P rows of G verdicts.
      rewards: ``[P, G]`` float32 after shaping; begins as the verdicts' rewards,
        0 where there is none.
      judged: ``[P, G]`` bool, False where the verdict has no reward.
    """

    prompts: Prompts
    contexts: np.ndarray
    context_mask: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    sampler_logps: np.ndarray
    stopped: np.ndarray
    completions: tuple[tuple[str, ...], ...]
    verdicts: tuple[tuple[Verdict, ...], ...]
    rewards: np.ndarray
    judged: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """``[P, G]`` number of tokens of each completion."""
        return self.mask.sum(-1)

    def take(self, indices: Sequence[int]) -> Groups:
        """The groups at `indices`, in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        arrays = {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(
            self,
            prompts=self.prompts.take(indices),
            completions=tuple(self.completions[i] for i in indices),
            verdicts=tuple(self.verdicts[i] for i in indices),
            **{name: array[rows] for name, array in arrays.items()},
        )


def concatenate(parts: Sequence[Groups]) -> Groups:
    """All groups of several rounds, in order; contexts are padded to one width."""
    first, *rest = parts
    if not rest:
        return first
    width = max(part.contexts.shape[1] for part in parts)

    def join(name):
        arrays = [getattr(part, name) for part in parts]
        if name in ("contexts", "context_mask"):
            # On the left, where the tokenised prompts have their padding.
            arrays = [np.pad(a, ((0, 0), (width - a.shape[1], 0))) for a in arrays]
        return np.concatenate(arrays)

    def chain(name):
        return tuple(row for part in parts for row in getattr(part, name))

    prompts = Prompts(
        *(
            tuple(x for part in parts for x in getattr(part.prompts, name))
            for name in ("ids", "messages", "columns", "demonstrations")
        )
    )
    arrays = {k: join(k) for k, v in vars(first).items() if isinstance(v, np.ndarray)}
    return Groups(
        prompts=prompts,
        completions=chain("completions"),
        verdicts=chain("verdicts"),
        **arrays,
    )
