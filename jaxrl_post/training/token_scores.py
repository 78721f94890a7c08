"""What the teacher would change in some of a step's completions, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxrl_post.models.memory import on_device
from jaxrl_post.models.policy import Policy
from jaxrl_post.recipes.batch import Batch
from jaxrl_post.recipes.recipe import Recipe, Scores, Term, Views
from jaxrl_post.sharding import batch_shards, processes, shard_batch
from jaxrl_post.training.forward import compute_scores
from jaxrl_post.training.state import TrainState, merge_params

SHOWN = 8
"""Groups of which one completion each is scored, where the step has so many."""


class TokenScores:
    """Scores one completion each of a few groups by student and self-teacher.

    A program of its own, compiled when first called; what is trained is as without it.
    """

    def __init__(
        self, policy: Policy, recipe: Recipe, mesh: jax.sharding.Mesh | None, **options
    ) -> None:
        """Args:

        policy: the model.
        recipe: its teacher is asked.
        mesh: as in `make_update_step`, as are the options `temperature` and
          `chunk_size`.
        """
        self._mesh, self._teacher = mesh, recipe.teacher.kind
        both = Term("shown", scores=_both, loss=_none, needs=frozenset({"teacher"}))
        seen = Recipe("shown", (both,), teacher=recipe.teacher, log_entropy=False)

        def score(models: Mapping[str, Any], batch: Batch) -> Scores:
            return compute_scores(policy, seen, models, batch, **options)

        self._score: Callable[..., Scores] = jax.jit(score)

    def __call__(
        self, state: TrainState, batch: Batch, rewards: np.ndarray
    ) -> dict[int, dict[str, list[float]]]:
        """Log-probs of the sampled tokens, before the step's updates.

        Args:
          state: before them.
          batch: of the step, with teacher contexts.
          rewards: ``[P, G]``; of the completions that the teacher has a context for
            the best is taken in even groups, the worst in odd ones.

        Returns:
          ``logps`` and ``teacher_logps`` of the real tokens, by row of the batch.
        """
        size = rewards.shape[1]
        distilled = np.asarray(batch.extras["distilled"]).reshape(-1, size)
        rows = chosen_rows(rewards, distilled, self._mesh)
        part = _take(batch, rows, size)
        params = merge_params(state.trainable, state.frozen)
        models = {"student": params, "teacher": params}
        if state.teacher is not None:
            models["teacher"] = merge_params(on_device(state.teacher), state.frozen)
        if self._mesh is None:
            scores = self._score(models, part)
        else:
            with jax.set_mesh(self._mesh):
                scores = self._score(models, shard_batch(part, self._mesh))
        found = {name: np.asarray(processes.fetch(x)) for name, x in scores.items()}
        mask = np.asarray(part.token_mask)
        real = np.flatnonzero(distilled.reshape(-1)[rows])
        return {
            int(rows[i]): {
                name: [round(float(x), 4) for x in found[name][i][mask[i]]]
                for name in ("logps", "teacher_logps")
            }
            for i in real
        }


def chosen_rows(
    rewards: np.ndarray, distilled: np.ndarray, mesh: jax.sharding.Mesh | None
) -> np.ndarray:
    """One row of each of the first few groups, as many as the mesh can share evenly.

    Args:
      rewards: ``[P, G]``, without the batch's filler groups.
      distilled: ``[P', G]`` bool, P' >= P with them.
      mesh: that the rows are to be spread over.

    >>> chosen_rows(np.array([[0.0, 1.0], [0.0, 1.0]]), np.ones((2, 2), bool), None)
    array([1, 2])
    """
    shards = 1 if mesh is None else batch_shards(mesh)
    groups, size = distilled.shape
    count = min(groups, -(-SHOWN // shards) * shards)
    sign = np.where(np.arange(groups) % 2, -1.0, 1.0)[:, None]
    filled = np.zeros(distilled.shape)
    filled[: len(rewards)] = rewards
    best = np.where(distilled, sign * filled, -np.inf).argmax(1)
    return np.arange(count) * size + best[:count]


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text; characters of several tokens stand at the
    last of them.

    The pieces together are the text, special tokens included.
    """
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        grown = whole and text.startswith(before)
        pieces.append(text[len(before) :] if grown else "")
        before = text if grown else before
    return pieces


def _both(views: Views) -> Scores:
    assert views.teacher is not None
    return {
        "logps": views.student.log_probs(views.tokens),
        "teacher_logps": views.teacher.log_probs(views.tokens),
    }


def _none(scores: Scores, batch: Batch) -> Any:
    raise NotImplementedError("these scores are shown, not trained on")


def _take(batch: Batch, rows: np.ndarray, size: int) -> Batch:
    """The rows, each with the context of its group."""
    own = rows // size
    assert batch.teacher_index is not None
    index = np.asarray(batch.teacher_index)[rows]
    assert batch.teacher_contexts is not None
    assert batch.teacher_context_mask is not None
    return Batch(
        contexts=batch.contexts[own],
        context_mask=batch.context_mask[own],
        responses=batch.responses[rows],
        token_mask=batch.token_mask[rows],
        loss_mask=batch.loss_mask[rows],
        sequence_mask=batch.sequence_mask[rows],
        advantages=batch.advantages[rows],
        teacher_contexts=batch.teacher_contexts[index],
        teacher_context_mask=batch.teacher_context_mask[index],
    )
