"""Running other people's code without trusting it to come back. Imports no jax."""

from jaxrl_post.isolation.batch import Judging, PoolStats
from jaxrl_post.isolation.pool import JudgePool

__all__ = ["JudgePool", "Judging", "PoolStats"]
