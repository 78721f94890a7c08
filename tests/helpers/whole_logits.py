"""Self-distillation from logits that exist: what the chunked path is held against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from tiny_policy import GROUP_SIZE, GROUPS, PARAMS, POLICY, make_batch

from jaxrl_post import losses
from jaxrl_post.training.forward import predicting_states
from jaxrl_post.training.state import init_state
from jaxrl_post.training.update import make_update_step

ROWS = GROUPS * GROUP_SIZE
TEACHER = POLICY.init(jax.random.key(7))


def distillation_batch(seed=0):
    """Three teacher contexts of 9, 5 and 7 tokens; two of eight rows have none."""
    rng = np.random.default_rng(100 + seed)
    batch = make_batch(seed)
    return batch.replace(
        old_logps=None,
        teacher_contexts=rng.integers(0, 19, (3, 9)).astype(np.int32),
        teacher_context_mask=np.arange(9)[::-1] < np.array([[9], [5], [7]]),
        teacher_index=rng.integers(0, 3, ROWS).astype(np.int32),
        extras={
            "distilled": np.arange(ROWS) % 4 != 1,
            "distillation_weight": rng.uniform(0.5, 1.5, ROWS).astype(np.float32),
        },
    )


def step(recipe, batch, optimizer, **options):
    """One update from `PARAMS`, with `TEACHER`: the state and the metrics."""
    state = init_state(
        jax.tree.map(jnp.copy, PARAMS), optimizer, recipe, jax.random.key(0)
    ).replace(teacher=jax.tree.map(jnp.copy, TEACHER))
    return make_update_step(POLICY, recipe, optimizer, **options)(state, batch)


def logits(params, contexts, mask, index, batch):
    states = predicting_states(
        POLICY, params, contexts, mask, index, batch.responses, batch.token_mask
    )
    return states @ POLICY.unembedding(params)[:19].T


def both_logits(params, batch, teacher="ema", teacher_rate=0.05):
    """The student's and the teacher's, ``[B, T, V]``."""
    behind = batch.teacher_contexts, batch.teacher_context_mask, batch.teacher_index
    student = logits(params, batch.contexts, batch.context_mask, None, batch)
    taught = logits(TEACHER, *behind, batch)
    if teacher == "trust_region":
        live = logits(params, *behind, batch)
        taught = (1 - teacher_rate) * taught + teacher_rate * live
    return student, taught


def sampled_logps(student, batch):
    logps = jax.nn.log_softmax(student)
    return jnp.take_along_axis(logps, batch.responses[..., None], -1)[..., 0]


def token_losses(student, teacher, batch, support="student", **arguments):
    """SDPO's loss of every token, and which of them count."""
    logps = sampled_logps(student, batch)
    old = jax.lax.stop_gradient(logps) if batch.old_logps is None else batch.old_logps
    if support == "sampled":
        taught = sampled_logps(teacher, batch)
        values = losses.sampled_token_distillation(logps, taught)
    else:
        values = losses.self_distillation(
            student, teacher, support=support, **arguments
        )
    values *= losses.importance_clip(logps, old, clip=2.0)
    values *= losses.truncated_importance_weights(
        old, batch.sampler_logps, batch.loss_mask
    )
    values *= batch.extras["distillation_weight"][:, None]
    return values, batch.loss_mask & batch.extras["distilled"][:, None]
