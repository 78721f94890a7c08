"""A model, optimizers and mistakes of a user's own, as configs name them."""

from __future__ import annotations

import jax
import optax
from transformers import AutoTokenizer

from jaxrl_post import models


def load(tokenizer, hidden=8, seed=0):
    """A bag of tokens: each position's state is the mean of those that it sees."""
    words = AutoTokenizer.from_pretrained(tokenizer)

    def apply(params, tokens, positions, mask):
        seen = mask / mask.sum(-1, keepdims=True)
        return (seen @ params["embed"][tokens]) @ params["mix"]

    def init(key):
        shapes = {"embed": (len(words), hidden), "mix": (hidden, hidden)}
        keys = jax.random.split(key, len(shapes))
        return {
            name: jax.random.normal(k, shape)
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    policy = models.policy_of(
        apply,
        init=init,
        unembedding=lambda params: params["embed"],
        vocab_size=len(words),
        max_positions=64,
    )
    return policy, policy.init(jax.random.key(seed)), words


def wrong_load(tokenizer, what):
    """What a function may return by mistake."""
    policy, params, words = load(tokenizer)
    return {
        "policy": policy,
        "swapped": (params, policy, words),
        "no params": (policy, {}, words),
        "no tokenizer": (policy, params, None),
        "other params": (policy, {"module": {"embed": params["module"]["mix"]}}, words),
        "few words": (
            models.policy_of(
                lambda params, *inputs: params["x"],
                init=lambda key: {"x": jax.random.normal(key, (4, 4))},
                unembedding=lambda params: params["x"],
                vocab_size=4,
            ),
            {"module": {"x": jax.numpy.ones((4, 4))}},
            words,
        ),
    }[what]


def like_adamw(learning_rate, max_grad_norm=1.0):
    """What the built-in name makes of its defaults."""
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(learning_rate, weight_decay=0.0, mu_dtype="float32"),
    )


def own_schedule(updates, peak: float = 1e-2):
    """A chain that leaves the section's learning rate alone."""
    return optax.sgd(optax.linear_schedule(peak, 0.0, updates))


def no_chain(learning_rate):
    """Forgets to return it."""
    optax.sgd(learning_rate)


NOT_CALLABLE = 3
