"""What sampling returns."""

from __future__ import annotations

from typing import TypeAlias

import jax
import numpy as np
from flax import struct

Array: TypeAlias = jax.Array | np.ndarray


class Rollouts(struct.PyTreeNode):
    """Sampled responses, the G of a prompt in adjacent rows: row ``p * G + g``.

    Attributes:
      tokens: ``[B, T]`` int32; the padding token where the mask is false.
      mask: ``[B, T]`` bool, true for generated tokens, a stop token included. It comes
        from generation: the padding token may be a token like any other.
      logps: ``[B, T]`` float32, the policy's log-probabilities at the sampling
        temperature, over the whole vocabulary (at temperature 1 if greedy).
      sampler_logps: ``[B, T]`` float32, log-probabilities under the distribution
        really sampled from: truncated, renormalised; 0 if greedy.
      stopped: ``[B]`` bool, ended by a stop token; false: cut at the length limit.
    """

    tokens: Array
    mask: Array
    logps: Array
    sampler_logps: Array
    stopped: Array

    @property
    def lengths(self) -> Array:
        """Generated tokens per response, ``[B]``, stop tokens included."""
        return self.mask.sum(axis=-1)
