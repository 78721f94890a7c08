"""Ahead of time: whether a config fits hardware that is not here, by XLA's compilers.

Nothing is run and no weights are read: programs are compiled from shapes.
"""

from jaxrl_post.preflight.hardware import open_topology, prepare_process
from jaxrl_post.preflight.verdict import DOES_NOT_FIT, FITS, check
from jaxrl_post.sharding.chips import CHIPS

__all__ = [
    "CHIPS",
    "DOES_NOT_FIT",
    "FITS",
    "check",
    "open_topology",
    "prepare_process",
]
