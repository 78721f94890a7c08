"""What differs from layer to layer: rotation and window."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import struct

from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.rope import frequencies

_UNBOUNDED = 2**30


class LayerKind(struct.PyTreeNode):
    """Numbers of one layer, or with a leading axis of all, to scan over.

    Attributes:
      frequencies: ``[rotary_dim / 2]``, angles per position; 0 is no rotation.
      multiplier: ``[]``, of cosine and sine.
      window: ``[]`` int32, slots that a token sees; None where no layer has a window.
    """

    frequencies: Any
    multiplier: Any
    window: Any = None


def layer_kinds(config: DecoderConfig) -> LayerKind:
    """Of all layers, as constants with a leading layer axis.

    >>> config = DecoderConfig(8, 4, 4, 3, 1, 1, 4, window=5, local_layers=(0, 2))
    >>> kinds = layer_kinds(config)
    >>> kinds.window.tolist(), kinds.frequencies.tolist()[0]
    ([5, 1073741824, 5], [1.0, 0.009999999776482582])
    """
    plain = frequencies(
        config.rotary_dim,
        config.rope_theta,
        dict(config.rope_scaling),
        config.max_positions,
        config.extended_positions,
    )
    local = plain
    if config.local_rope_theta is not None:
        local = frequencies(config.rotary_dim, config.local_rope_theta, {}, 1)
    layers = range(config.num_layers)
    chosen = [local if i in config.local_layers else plain for i in layers]
    rotated = np.array([i not in config.unrotated_layers for i in layers], np.float32)
    ours = np.array([multiplier for _, multiplier in chosen], np.float32)
    window = None
    if config.local_layers:
        seen = [config.window if i in config.local_layers else None for i in layers]
        window = np.array([_UNBOUNDED if n is None else n for n in seen], np.int32)
    return LayerKind(
        frequencies=np.stack([f for f, _ in chosen]) * rotated[:, None],
        multiplier=np.where(rotated, ours, 1).astype(np.float32),
        window=window,
    )
