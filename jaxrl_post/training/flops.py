"""Floating-point operations that a model itself needs, and how many a run reaches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import chex
import jax
import numpy as np

from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.policy import Policy
from jaxrl_post.recipes.batch import Batch
from jaxrl_post.recipes.recipe import Recipe
from jaxrl_post.sharding.chips import peak_flops
from jaxrl_post.training.config import Config
from jaxrl_post.training.state import TrainState


@dataclass(frozen=True)
class Lengths:
    """Tokens of contexts and of the sequences behind them.

    Attributes:
      contexts: ``[C]``.
      before: ``[B]``, of each sequence's context.
      responses: ``[B]``.
    """

    contexts: np.ndarray
    before: np.ndarray
    responses: np.ndarray

    @classmethod
    def full(cls, contexts: tuple[int, ...], responses: tuple[int, ...]) -> Lengths:
        """Of arrays ``[C, S]`` and ``[B, T]`` without padding."""
        (count, width), (rows, time) = contexts, responses
        return cls(np.full(count, width), np.full(rows, width), np.full(rows, time))

    @classmethod
    def of(cls, context_mask: Any, token_mask: Any, index: Any = None) -> Lengths:
        """Of what two masks leave; `index` as `Batch.context_index`."""
        contexts, responses = (np.asarray(m).sum(1) for m in (context_mask, token_mask))
        if index is None:
            index = np.arange(len(responses)) // (len(responses) // len(contexts))
        return cls(contexts, contexts[np.asarray(index)], responses)


class ModelFlops:
    """What the model itself needs, by the rule of 2 N per token forward, 6 N with the
    backward pass; of what is frozen 4 N, for it has no gradients of weights.

    N: the layers' matrices, without the embedding, of experts the share that a token
    is routed to; the head's where log-probs are asked for. Attention: what a causal
    mask leaves, and windows.
    """

    def __init__(
        self, sizes: DecoderConfig, params: chex.ArrayTree, frozen: Any = None
    ) -> None:
        """
        Args:
          sizes: of the model.
          params: what is trained: everything, or an adapter of the layers.
          frozen: the rest, where that is an adapter.
        """
        self._sizes = sizes
        self._frozen = _matrices(sizes, frozen) if frozen else 0.0
        self.layers = self._frozen + _matrices(sizes, params)
        self.head = sizes.rows * sizes.hidden_size
        self._frozen_head = self.head if frozen else 0
        self._base = ModelFlops(sizes, frozen) if frozen else self

    def forward(self, rows: Any, time: Any, before: Any = 0) -> Any:
        """Rows of so many tokens behind `before` others, without the head."""
        sizes = self._sizes
        local = len(sizes.local_layers)
        pairs = (sizes.num_layers - local) * _pairs(time, before, before + time)
        pairs += local * _pairs(time, before, sizes.window or 0)
        attention = 4.0 * sizes.num_heads * sizes.head_dim * rows * pairs
        return 2.0 * self.layers * rows * time + attention

    def view(self, seen: Lengths) -> float:
        """Contexts once each, the responses behind them, and the head at these."""
        contexts = self.forward(1, seen.contexts).sum()
        responses = self.forward(1, seen.responses, seen.before).sum()
        return float(contexts + responses + 2.0 * self.head * seen.responses.sum())

    def update(
        self, recipe: Recipe, seen: Lengths, of_teacher: Lengths | None
    ) -> float:
        """Of one optimizer update.

        Args:
          recipe: which models read the batch.
          seen: its contexts and responses.
          of_teacher: its responses behind the teacher's contexts, if there are any.
        """
        tokens = seen.contexts.sum() + seen.responses.sum()
        no_gradient = 2.0 * self._frozen * tokens
        no_gradient += 2.0 * self._frozen_head * seen.responses.sum()
        total = 3 * self.view(seen) - float(no_gradient)
        if "reference" in recipe.needs:
            total += self._base.view(seen)
        if "teacher" in recipe.needs and of_teacher is not None:
            # A trust region's teacher is two models.
            models = 2 if recipe.teacher.kind == "trust_region" else 1
            total += models * self.view(of_teacher)
        return total

    def decode(self, rows: int, before: int) -> float:
        """Of one more token for each of so many sequences."""
        return self.forward(rows, 1, before) + 2.0 * self.head * rows


class Utilisation:
    """Model FLOP utilisation (MFU): the operations that a step's groups need of the
    model, by those that the devices could make in the time.

    Padding, what is computed twice, and groups that were sampled and dropped count for
    nothing.

    Source: arXiv 2204.02311, appendix B.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        recipe: Recipe,
        mesh: jax.sharding.Mesh | None,
    ) -> None:
        device, count = jax.devices()[0], 1
        if mesh is not None:
            device, count = mesh.devices.flat[0], mesh.size
        peak = config.mesh.peak_flops or peak_flops(device)
        self._peak = None if peak is None else peak * count
        self._scored = config.training.updates_per_step > 1
        self._policy, self._recipe = policy, recipe
        self._model: ModelFlops | None = None

    def __call__(
        self, state: TrainState, batch: Batch, update_time: float, step_time: float
    ) -> dict[str, float]:
        """``throughput/update_mfu`` and ``throughput/mfu``, of the whole step.

        Nothing where the peak is not known, or the model is not one of the package's.

        Args:
          state: with parameters of the run's shapes.
          batch: of the step, on the host.
          update_time, step_time: seconds.
        """
        sizes = self._policy.config
        if self._peak is None or not isinstance(sizes, DecoderConfig):
            return {}
        if self._model is None:
            self._model = ModelFlops(sizes, state.trainable, state.frozen)
        seen = Lengths.of(batch.context_mask, batch.token_mask, batch.context_index)
        of_teacher = None
        if batch.teacher_context_mask is not None:
            of_teacher = Lengths.of(
                batch.teacher_context_mask, batch.token_mask, batch.teacher_index
            )
        update = self._model.update(self._recipe, seen, of_teacher)
        once = self._model.view(seen)
        update += once if self._scored else 0.0
        sampled = once if self._recipe.rollouts else 0.0
        return {
            "throughput/update_mfu": update / update_time / self._peak,
            "throughput/mfu": (update + sampled) / step_time / self._peak,
        }


def _matrices(sizes: DecoderConfig, params: Any) -> float:
    """Weights of the layers' matrices, of experts the share that a token is routed
    to."""
    of_experts = sizes.experts_per_token / (sizes.num_experts or 1)
    adapter = ("lora_a", "lora_b")

    def count(path, x):
        names = [part.key for part in path]
        if names[-1] not in ("kernel", "router", *adapter):
            return 0.0
        routed = sizes.num_experts and names[0] == "mlp" and names[-1] != "router"
        return (of_experts if routed else 1.0) * math.prod(x.shape)

    leaves = jax.tree_util.tree_leaves_with_path(params["layers"])
    return sum(count(*leaf) for leaf in leaves)


def _pairs(time: Any, before: Any, window: Any) -> Any:
    """Pairs of tokens that see each other: ``sum_t min(before + t, window)``."""
    growing = np.clip(window - before, 0, time)
    return growing * before + growing * (growing + 1) / 2 + (time - growing) * window
