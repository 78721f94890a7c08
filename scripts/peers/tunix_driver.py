"""Tunix's side of scripts/bench_peers.py; runs in an environment of Tunix's own.

python tunix_driver.py WORK.json RESULT.json
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rewards
from flax import nnx
from transformers import AutoTokenizer
from tunix.models.qwen2.model import ModelConfig
from tunix.models.qwen2.params import create_model_from_safe_tensors
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig


def open_model(work: dict, mesh):
    told = json.loads(Path(work["checkpoint"], "config.json").read_text())
    config = ModelConfig(
        num_layers=told["num_hidden_layers"],
        vocab_size=told["vocab_size"],
        embed_dim=told["hidden_size"],
        hidden_dim=told["intermediate_size"],
        num_heads=told["num_attention_heads"],
        head_dim=told["hidden_size"] // told["num_attention_heads"],
        num_kv_heads=told["num_key_value_heads"],
        rope_theta=10_000,
        norm_eps=told["rms_norm_eps"],
        use_tied_embedding=told["tie_word_embeddings"],
    )
    return create_model_from_safe_tensors(
        work["checkpoint"], config, mesh, dtype=jnp.float32
    )


def probe_loss(model, ids: np.ndarray) -> float:
    """Of the first prompts, as everyone computes it."""
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    causal = jnp.broadcast_to(
        jnp.tril(jnp.ones((ids.shape[1],) * 2, bool)), (len(ids), *[ids.shape[1]] * 2)
    )
    logits, _ = model(jnp.asarray(ids), places, None, causal)
    return float(
        optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1].astype(jnp.float32), ids[:, 1:]
        ).mean()
    )


def timed(owner, method: str, then=lambda result: None) -> list[tuple[float, float]]:
    """Replaces a method by one that is timed: its starts and durations."""
    plain, seconds = getattr(owner, method), []

    def run(*args, **kwargs):
        start = time.perf_counter()
        result = plain(*args, **kwargs)
        seconds.append((start, time.perf_counter() - start))
        then(result)
        return result

    setattr(owner, method, run)
    return seconds


def main(work: dict) -> dict:
    count, new, length = work["count"], work["new"], work["prompt_length"]
    tokenizer = AutoTokenizer.from_pretrained(work["checkpoint"])
    mesh = jax.make_mesh(
        (1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    model = open_model(work, mesh)
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    first = np.asarray(tokenizer(work["prompts"][:count])["input_ids"])
    probe = probe_loss(model, first)
    roles = (
        rl_cluster.Role.ACTOR,
        rl_cluster.Role.REFERENCE,
        rl_cluster.Role.ROLLOUT,
    )
    cluster = rl_cluster.RLCluster(
        actor=model,
        reference=None,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                # One more step than is counted: of the last one no end is seen.
                max_steps=work["steps"] + 2,
                actor_optimizer=optax.adamw(work["learning_rate"]),
                eval_every_n_steps=1000,
                mini_batch_size=count,
                train_micro_batch_size=count,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=new,
                max_prompt_length=length,
                kv_cache_size=length + new + 8,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
                eos_tokens=[tokenizer.eos_token_id],
            ),
        ),
    )
    lengths: list[int] = []
    generate = timed(
        cluster, "generate", lambda made: lengths.extend(map(len, made.tokens))
    )
    update = timed(cluster, "update_actor")
    reward = getattr(rewards, work["reward"])

    def judge(prompts, completions, **columns):
        return reward(completions)

    learner = GRPOLearner(
        rl_cluster=cluster,
        reward_fns=judge,
        algo_config=GRPOConfig(
            num_generations=work["group"], num_iterations=1, beta=0.0, epsilon=0.2
        ),
    )
    asked = (work["prompts"] * 2)[: (work["steps"] + 2) * count]
    batches = [
        {"prompts": np.array(asked[i : i + count])} for i in range(0, len(asked), count)
    ]
    with mesh:
        learner.train(batches)
    starts = [start for start, _ in generate]
    steps = len(starts) - 1
    sequences = count * work["group"]
    return {
        "version": importlib.metadata.version("google-tunix"),
        "step": [b - a for a, b in zip(starts, starts[1:], strict=False)],
        "generate": [seconds for _, seconds in generate[:steps]],
        "update": [seconds for _, seconds in update[:steps]],
        "work": {
            "parameters": parameters,
            "prompt_tokens": first.size,
            "lengths": sorted(set(lengths)),
            "sequences": len(lengths) - sequences,
            "optimizer_steps": cluster.global_steps - 1,
            "probe_loss": probe,
        },
    }


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
