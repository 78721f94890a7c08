"""Optax gradient transformations of this package."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxrl_post.information import AdaptiveSensitivity, step_multiplier
from jaxrl_post.numerics import Scalar, check_number, is_traced
from jaxrl_post.reduction import Reduction

# 0, but not an int: those optax.inject_hyperparams turns into arrays, and then the
# state of a transform without any delay could not be initialised under jit.
_NO_DELAY = np.int32(0)


class ScaleByInformationState(NamedTuple):
    """State of `scale_by_information`; floats are in the default floating dtype.

    Attributes:
      finite: [] int32, updates with a finite gain (what the average has seen).
      nonfinite: [] int32, updates whose gain was not finite.
      gain: [] the last finite gain, smoothed if smoothing is on; 0 before the first.
      multiplier: [] the multiplier that the last update was scaled with.
      average: [] exponential sum behind the smoothed gain, without bias correction.
      pending: [delay] multipliers that wait for their update, the next one first.
      sensitivity: [] alpha of the next gain where it adapts, else None.
    """

    finite: jax.Array
    nonfinite: jax.Array
    gain: jax.Array
    multiplier: jax.Array
    average: jax.Array
    pending: jax.Array
    sensitivity: jax.Array | None


def scale_by_information(
    sensitivity: Scalar,
    *,
    max_multiplier: Scalar = 2.0,
    min_multiplier: Scalar = 0.0,
    smoothing: Scalar | None = None,
    delay: SupportsIndex = _NO_DELAY,
    adapt: AdaptiveSensitivity | None = None,
) -> optax.GradientTransformationExtraArgs:
    """PGPO: multiplies the finished update by `rho_k = min(exp(alpha I_k), rho_max)`.

    The gain comes in with each update, as a scalar or as the `Reduction` that
    `information.information_gain` returns::

        updates, state = optimizer.update(grads, state, params, information=gain)

    Its place is after moments and clipping: scaling the gradient or the loss instead
    would be undone by Adam's normalisation. After `add_decayed_weights` the decay is
    scaled too, before it it is not; it commutes with the learning rate. It does not
    belong inside `optax.contrib.schedule_free` or `optax.lookahead`, which average
    the iterates that it scales. Under `optax.MultiSteps`, which stays outermost, only
    the last mini-step's information is used: pass the running `Reduction`. Under
    `optax.inject_hyperparams` a delay is static: `static_args=("delay",)`.

    Args:
      sensitivity: `alpha >= 0`. May be traced.
      max_multiplier: `rho_max >= 1`; the paper does not say, 2 is ours. May be traced.
      min_multiplier: floor of rho in [0, 1]. May be traced.
      smoothing: decay in [0, 1) of a bias-corrected exponential average of the gain,
        `I <- smoothing * I + (1 - smoothing) * I_k`; None: no average. May be traced.
      delay: rho of update k comes from the gain of update k - delay; the first
        `delay` updates use 1. With 1 the multiplier is independent of the noise in
        the gradient it scales, which the paper's theory assumes and its Algorithm 1
        (0) does not give.
      adapt: lets alpha follow the multipliers, from `sensitivity` on. The alpha of a
        gain depends on earlier gains only. None: alpha stays.

    Returns:
      A transformation whose `update` needs `information`. A gain that is not finite
      gives that step the multiplier 1, is counted, and leaves average and alpha alone.

    Raises:
      ValueError: a parameter outside its range; information that is not a scalar.
      TypeError: `update` without `information`.

    Source: PGPO, arXiv 2606.03620, Eq. 9 and Algorithm 1.

    >>> optimizer = optax.chain(optax.sgd(0.1), scale_by_information(1.0))
    >>> params = jnp.array([1.0])
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update(params, state, params, information=0.5)
    >>> print(updates.round(4), state[-1].multiplier.round(4))
    [-0.1649] 1.6487
    """
    check_number("sensitivity", sensitivity, 0)
    check_number("max_multiplier", max_multiplier, 1)
    check_number("min_multiplier", min_multiplier, 0, 1)
    check_number("smoothing", smoothing, 0, 1, open_high=True)
    check_number("delay", delay, 0)
    if adapt is not None:
        check_number(
            "sensitivity", sensitivity, 0, adapt.max_sensitivity, open_low=True
        )
        # Never reached otherwise, and alpha would rise to its bound.
        name = "max_multiplier (with adapt, above its target)"
        check_number(name, max_multiplier, adapt.target, open_low=True)

    def init_fn(params: optax.Params) -> ScaleByInformationState:
        del params
        if is_traced(delay):
            raise TypeError(
                "delay sets the shape of the state and must be static; with "
                "optax.inject_hyperparams add static_args=('delay',)."
            )
        # A buffer each: the state may be donated.
        return ScaleByInformationState(
            finite=jnp.zeros((), jnp.int32),
            nonfinite=jnp.zeros((), jnp.int32),
            gain=jnp.zeros(()),
            multiplier=jnp.ones(()),
            average=jnp.zeros(()),
            pending=jnp.ones(operator.index(delay)),
            sensitivity=None if adapt is None else jnp.array(sensitivity, float),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByInformationState,
        params: optax.Params | None = None,
        *,
        information: ArrayLike | Reduction | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByInformationState]:
        del params, extra_args
        latest = _scalar_gain(information).astype(state.gain.dtype)
        is_finite = jnp.isfinite(latest)

        def if_finite(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(is_finite, new, old).astype(old.dtype)

        finite = if_finite(optax.safe_increment(state.finite), state.finite)
        gain, average = latest, state.average
        if smoothing is not None:
            average = smoothing * average + (1 - smoothing) * latest
            gain = average / (1 - smoothing ** jnp.maximum(finite, 1))
        alpha = state.sensitivity
        multiplier = step_multiplier(
            gain,
            sensitivity=sensitivity if alpha is None else alpha,
            max_multiplier=max_multiplier,
            min_multiplier=min_multiplier,
        )
        if adapt is not None and alpha is not None:
            alpha = if_finite(adapt.next(alpha, multiplier), alpha)
        # The queue's length, not `delay`: inject_hyperparams may trace the latter.
        queue = jnp.append(state.pending, multiplier)
        multiplier, pending = queue[0], queue[1:]
        updates = jax.tree.map(lambda u: (multiplier * u).astype(u.dtype), updates)
        return updates, ScaleByInformationState(
            finite=finite,
            nonfinite=jnp.where(
                is_finite, state.nonfinite, optax.safe_increment(state.nonfinite)
            ),
            gain=if_finite(gain, state.gain),
            multiplier=multiplier,
            average=if_finite(average, state.average),
            pending=pending,
            sensitivity=alpha,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scalar_gain(information: ArrayLike | Reduction | None) -> jax.Array:
    if information is None:
        raise TypeError(
            "scale_by_information needs the gain of this step: call "
            "optimizer.update(grads, state, params, information=gain)."
        )
    if isinstance(information, Reduction):
        information = information.mean()
    gain = jnp.asarray(information)
    if gain.ndim:
        raise ValueError(
            f"information has shape {gain.shape}; it is one scalar per optimizer step, "
            "or the Reduction of information.information_gain."
        )
    return gain


def pgpo_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    sensitivity: Scalar,
    max_multiplier: Scalar = 2.0,
    min_multiplier: Scalar = 0.0,
    smoothing: Scalar | None = None,
    delay: SupportsIndex = _NO_DELAY,
    adapt: AdaptiveSensitivity | None = None,
    scale_decay: bool = True,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    max_norm: float | None = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with PGPO's modulation in its right place.

    Clip by global norm, Adam, decoupled weight decay, learning rate, and
    `scale_by_information` last. The defaults are the paper's optimizer settings.

    Args:
      learning_rate: a number or a schedule over updates.
      sensitivity, max_multiplier, min_multiplier, smoothing, delay, adapt: as in
        `scale_by_information`.
      scale_decay: whether rho scales the weight decay too, as "rho multiplies the
        step" reads; the paper does not say.
      b1, b2, eps: Adam's.
      weight_decay: decoupled, multiplied by the learning rate.
      mask: which leaves are decayed, as in `optax.adamw`.
      max_norm: bound on the gradient's global norm before Adam; None: no clipping.

    Returns:
      A transformation whose `update` needs `params` and `information`.

    Source: PGPO, arXiv 2606.03620, Algorithm 1 and Table 2.

    >>> optimizer = pgpo_adamw(0.1, sensitivity=1.0, weight_decay=0.0)
    >>> params = jnp.array([1.0])
    >>> state = optimizer.init(params)
    >>> updates, _ = optimizer.update(params, state, params, information=0.5)
    >>> print(updates.round(4))
    [-0.1649]
    """
    modulation = scale_by_information(
        sensitivity,
        max_multiplier=max_multiplier,
        min_multiplier=min_multiplier,
        smoothing=smoothing,
        delay=delay,
        adapt=adapt,
    )
    decay = [
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    ]
    return optax.chain(
        *([] if max_norm is None else [optax.clip_by_global_norm(max_norm)]),
        optax.scale_by_adam(b1, b2, eps),
        *([*decay, modulation] if scale_decay else [modulation, *decay]),
    )
