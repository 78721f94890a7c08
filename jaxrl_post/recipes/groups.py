"""Judged groups of rollouts on the host, before they become a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxrl_post.types import Prompts, Verdict


@dataclass(frozen=True)
class Demonstrations:
    """A trajectory for each of P questions that the policy did not write, or not alone.

    Rows without an available one may hold anything.

    Attributes:
      tokens: ``[P, T]`` int32; mask: ``[P, T]`` bool, True up to and including the
        stop token.
      is_teacher: ``[P, T]`` bool, the demonstration's tokens. Where only its beginning
        was given, the rest is the policy's own continuation.
      sampler_logps: ``[P, T]`` float32 of that continuation, 0 elsewhere.
      stopped: ``[P]`` bool, False where the length limit cut the continuation.
      rewards: ``[P]`` float32, what the judge gives the whole text.
      available: ``[P]`` bool: it exists, it fits, and the judge calls it a success (the
        demonstration; a continuation must only have been judged).
      texts: P texts; verdicts: P verdicts, None where nothing was judged.
    """

    tokens: np.ndarray
    mask: np.ndarray
    is_teacher: np.ndarray
    sampler_logps: np.ndarray
    stopped: np.ndarray
    rewards: np.ndarray
    available: np.ndarray
    texts: tuple[str, ...]
    verdicts: tuple[Verdict | None, ...]


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
      demonstrations: one per question, where the recipe asks for them.
      is_teacher: ``[P, G, T]`` bool, the tokens of demonstrations that took a rollout's
        place; None where no transform puts any there.
      observed: ``[P, G, T]`` bool, tokens that the task answered between two turns,
        which the policy reads and is not trained on; None where there are none.
      extras: further arrays ``[P, G, ...]`` by name, which become `Batch.extras`.
      posterior: ``[P, 2]`` float64, a and b of the Beta distribution of each prompt's
        success rate: before this visit, earlier ones faded, until a transform that
        counts successes adds this visit. None: nothing is remembered.
      metrics: numbers ``[P]`` by name, logged as means over the groups trained on.
      progress: share of the run's steps that are done, in [0, 1).
      seed: for a transform's own random choices, another one each time.
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
    demonstrations: Demonstrations | None = None
    is_teacher: np.ndarray | None = None
    observed: np.ndarray | None = None
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    posterior: np.ndarray | None = None
    metrics: Mapping[str, np.ndarray] = field(default_factory=dict)
    progress: float = 0.0
    seed: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """``[P, G]`` number of tokens of each completion."""
        return self.mask.sum(-1)

    def take(self, indices: Sequence[int]) -> Groups:
        """The groups at `indices`, in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        return _by_group(
            [self],
            array=lambda values: values[0][rows],
            texts=lambda values: tuple(values[0][i] for i in indices),
        )


def concatenate(parts: Sequence[Groups]) -> Groups:
    """All groups of several rounds, in order; contexts are padded to one width."""
    width = max(part.contexts.shape[1] for part in parts)

    def widened(part):
        # On the left, where the tokenised prompts have their padding.
        missing = ((0, 0), (width - part.contexts.shape[1], 0))
        names = ("contexts", "context_mask")
        padded = {name: np.pad(getattr(part, name), missing) for name in names}
        return replace(part, **padded)

    return _by_group(
        [widened(part) for part in parts],
        array=np.concatenate,
        texts=lambda values: tuple(x for value in values for x in value),
    )


def _by_group(
    parts: Sequence[Any], *, array: Callable[..., Any], texts: Callable[..., Any]
) -> Any:
    """One of several groups: whatever has a row for each group goes through a function.

    Args:
      parts: `Groups`, or what they consist of.
      array: for arrays.
      texts: for tuples.
    """
    first = parts[0]
    if isinstance(first, np.ndarray):
        return array(parts)
    if isinstance(first, tuple):
        return texts(parts)
    if isinstance(first, Mapping):
        return {
            k: _by_group([p[k] for p in parts], array=array, texts=texts) for k in first
        }
    if isinstance(first, Groups | Demonstrations | Prompts):
        changed = {
            k: _by_group([vars(p)[k] for p in parts], array=array, texts=texts)
            for k in vars(first)
        }
        return replace(first, **changed)
    return first  # None, or a number that all share
