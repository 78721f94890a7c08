"""From per-token values to one number, in a form that adds up over micro-batches."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike

from jaxrl_post.numerics import check_choice, check_number, promote

MODES = (
    "token_mean",
    "sequence_mean",
    "sequence_mean_over_all",
    "sequence_sum_mean",
    "prompt_mean",
    "constant",
)


class Reduction(struct.PyTreeNode):
    """A mean that is not divided yet, so that parts of a batch can be added first.

    Attributes:
      total: [] weighted sum of the values.
      denominator: [] what to divide it by; depends on masks only, never on values.

    >>> first, second = Reduction(3.0, 1.0), Reduction(3.0, 2.0)
    >>> float((first + second).mean())
    2.0
    >>> float(Reduction(0.0, 0.0).mean())
    0.0
    """

    total: jax.Array
    denominator: jax.Array

    def mean(self) -> jax.Array:
        """`total / denominator`, and 0 where nothing was counted."""
        empty = jnp.equal(self.denominator, 0)
        ratio = self.total / jnp.where(empty, 1, self.denominator)
        return jnp.where(empty, 0, ratio)

    def __add__(self, other: Reduction) -> Reduction:
        return Reduction(self.total + other.total, self.denominator + other.denominator)


def token_weights(
    mask: ArrayLike,
    *,
    mode: str = "token_mean",
    sequence_mask: ArrayLike | None = None,
    group_size: int | None = None,
    denominator: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weight of every token in a mean, and the mean's denominator.

    Every mode of `reduce` is `sum(weights * values) / denominator`. A trainer that
    splits a batch computes both once, from the masks of the whole batch, and adds up
    the weighted sums of the parts: then no split can change the loss, not even one
    through the middle of a group.

    Args:
      mask, mode, sequence_mask, group_size, denominator: as in `reduce`.

    Returns:
      weights [B, T], 0 where masked, and the denominator [].

    >>> weights, denominator = token_weights([[1, 1], [1, 0]], mode="sequence_mean")
    >>> weights.tolist(), float(denominator)
    ([[0.5, 0.5], [1.0, 0.0]], 2.0)
    """
    check_choice("mode", mode, MODES)
    if (denominator is not None) != (mode == "constant"):
        raise ValueError(
            f"mode={mode!r} with denominator={denominator}: an explicit denominator "
            "belongs to mode='constant', which needs one."
        )
    check_number("denominator", denominator, 0, open_low=True)
    mask = jnp.asarray(mask)
    chex.assert_rank(mask, 2)
    real = jnp.ones(mask.shape[0], bool)
    if sequence_mask is not None:
        real = jnp.asarray(sequence_mask) != 0
        chex.assert_shape(real, mask.shape[:1])
    mask = (mask != 0) & real[:, None]

    # The default floating dtype: float64 under x64, where float32 weights would cost
    # half the digits.
    weights = mask.astype(jnp.result_type(float))
    tokens = weights.sum(-1)
    if mode == "token_mean":
        return weights, tokens.sum()
    if mode == "sequence_sum_mean":
        return weights, (tokens > 0).sum().astype(weights.dtype)
    if mode == "constant":
        return weights, jnp.asarray(denominator, weights.dtype)
    if mode == "prompt_mean":
        rows = mask.shape[0]
        if group_size is None or group_size < 1 or rows % group_size:
            raise ValueError(
                f"mode='prompt_mean' needs a group_size that divides the {rows} rows, "
                f"got {group_size}; rows of one group must be adjacent."
            )
        groups = tokens.reshape(rows // group_size, group_size).sum(-1)
        tokens, counted = jnp.repeat(groups, group_size), (groups > 0).sum()
    else:
        counted = (real if mode == "sequence_mean_over_all" else tokens > 0).sum()
    return weights / jnp.maximum(tokens, 1)[:, None], counted.astype(weights.dtype)


def reduce(
    values: ArrayLike,
    mask: ArrayLike,
    *,
    mode: str = "token_mean",
    sequence_mask: ArrayLike | None = None,
    group_size: int | None = None,
    denominator: ArrayLike | None = None,
) -> Reduction:
    """Per-token values as one `Reduction`.

    With `n_b` the tokens of sequence `b` and `s_b` the sum of its values:

    - `token_mean`: `sum s_b / sum n_b` (DAPO).
    - `sequence_mean`: mean of `s_b / n_b` over the sequences with a token (GRPO).
    - `sequence_mean_over_all`: the same sum over *all* real sequences, empty ones
      included; filler rows (`sequence_mask` 0) are not counted. This is what SDPO's
      published configurations effectively optimise.
    - `sequence_sum_mean`: mean of `s_b` over the sequences with a token.
    - `prompt_mean`: token mean of each group, then the mean over groups with a token.
    - `constant`: `sum s_b / denominator`: Dr. GRPO's B * L, LUFFY's padded length.

    Reductions of disjoint sets of rows of one batch add up to the batch's; under
    `prompt_mean` as long as groups stay whole (else use `token_weights`), under
    `constant` if each part brings its share of the denominator.

    Args:
      values: [B, T] per-token loss or metric. Masked places may hold anything; for
        finite *gradients* sanitise the inputs of the loss too (`losses.mask_inputs`).
      mask: [B, T] bool or number; every non-zero place counts as one token.
      mode: one of the above.
      sequence_mask: [B] real rows; None: all are.
      group_size: rows per group, adjacent; used by `prompt_mean` only.
      denominator: positive number; for `constant` only.

    Raises:
      ValueError: unknown mode; group size missing or not a divisor of B; denominator
        missing, not positive, or given to a mode that computes its own.

    Source: arXiv 2402.03300 (sequence_mean), 2503.14476 (token_mean), 2503.20783
    (constant).

    >>> values, mask = jnp.array([[1.0, 3.0], [5.0, 9.0]]), jnp.array([[1, 1], [1, 0]])
    >>> for mode in ("token_mean", "sequence_mean", "sequence_sum_mean"):
    ...     print(mode, float(reduce(values, mask, mode=mode).mean()))
    token_mean 3.0
    sequence_mean 3.5
    sequence_sum_mean 4.5
    """
    (values,) = promote(values)
    chex.assert_equal_shape([values, jnp.asarray(mask)])
    weights, count = token_weights(
        mask,
        mode=mode,
        sequence_mask=sequence_mask,
        group_size=group_size,
        denominator=denominator,
    )
    weights = weights.astype(values.dtype)
    total = (jnp.where(weights > 0, values, 0) * weights).sum()
    return Reduction(total, count.astype(values.dtype))
