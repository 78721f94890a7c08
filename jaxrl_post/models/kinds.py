"""What differs from layer to layer: rotation and window."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from flax import struct

from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.rope import frequencies

_UNBOUNDED = 2**30


class LayerKind(struct.PyTreeNode):
    """Numbers of one layer, or with a leading axis of all, to scan over.

    Attributes:
      rotation: ``[]`` int32, which of the `Rotations` it has; None where there is one.
      window: ``[]`` int32, slots that a token sees; None where no layer has a window.
    """

    rotation: Any = None
    window: Any = None


class Rotations(NamedTuple):
    """How the layers turn queries and keys, each of K ways once.

    Attributes:
      frequencies: ``[K, rotary_dim / 2]``, angles per position; 0 is no rotation.
      multipliers: ``[K]``, of cosine and sine.
      of_layers: ``[L]`` int32, which one a layer has.
    """

    frequencies: np.ndarray
    multipliers: np.ndarray
    of_layers: np.ndarray


def layer_kinds(config: DecoderConfig) -> LayerKind:
    """Of all layers, as constants with a leading layer axis.

    >>> config = DecoderConfig(8, 4, 4, 3, 1, 1, 4, window=5, local_layers=(0, 2))
    >>> layer_kinds(config).window.tolist()
    [5, 1073741824, 5]
    """
    window = None
    if config.local_layers:
        layers = range(config.num_layers)
        seen = [config.window if i in config.local_layers else None for i in layers]
        window = np.array([_UNBOUNDED if n is None else n for n in seen], np.int32)
    _, multipliers, of_layers = rotations(config)
    return LayerKind(of_layers if len(multipliers) > 1 else None, window)


def rotations(config: DecoderConfig) -> Rotations:
    """Of a model.

    >>> config = DecoderConfig(8, 4, 4, 3, 1, 1, 4, unrotated_layers=(1,))
    >>> frequencies, multipliers, of_layers = rotations(config)
    >>> frequencies.tolist(), of_layers.tolist()
    ([[1.0, 0.009999999776482582], [0.0, 0.0]], [0, 1, 0])
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
    ways: dict[bytes, tuple[int, np.ndarray, float]] = {}
    of_layers = []
    for i in range(config.num_layers):
        angles, multiplier = local if i in config.local_layers else plain
        if i in config.unrotated_layers:
            angles, multiplier = np.zeros_like(angles), 1.0
        key = np.append(angles, multiplier).tobytes()
        of_layers.append(ways.setdefault(key, (len(ways), angles, multiplier))[0])
    _, angles, multipliers = zip(*ways.values(), strict=True)
    return Rotations(
        np.stack(angles),
        np.array(multipliers, np.float32),
        np.array(of_layers, np.int32),
    )
