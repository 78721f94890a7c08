"""Running other people's code without trusting it to come back. Imports no jax."""

from jaxrl_post.isolation.pool import JudgePool, PoolStats

__all__ = ["JudgePool", "PoolStats"]
