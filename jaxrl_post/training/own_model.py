"""Models of the user's own, named by a config: opened, checked, written."""

from __future__ import annotations

import os
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.errors import InputError, shown
from jaxrl_post.models.checkpoints import quiet_import
from jaxrl_post.models.policy import Policy
from jaxrl_post.models.weights_out import new_folder, write_json
from jaxrl_post.sharding import param_shardings
from jaxrl_post.tasks.lookup import call_own, is_own, resolve
from jaxrl_post.training.config import Config

WEIGHTS = "params.safetensors"
"""The file of a run's model whose parameters are those of a user's module."""


def check_model_name(config: Config) -> None:
    """Refuses a function in `model.path` that does not exist, before it is needed."""
    if is_own(config.model.path):
        try:
            resolve(config.model.path)
        except InputError as error:
            raise InputError(f"model.path: {error}") from error


def open_own_model(
    config: Config, mesh: jax.sharding.Mesh | None = None
) -> tuple[Policy, chex.ArrayTree, Any]:
    """What the function that `model.path` names returns, on the mesh, if any.

    Floating parameters are cast to `model.param_dtype`.

    Raises:
      InputError: the function does not exist, does not fit the section, or returns
        something else than a policy, its parameters and a tokenizer.
    """
    section = config.model
    offered = {
        "compute_dtype": section.compute_dtype,
        "attention": section.attention,
        "remat": section.remat,
        "seed": config.run.seed,
    }
    with quiet_import():  # the tokenizer's
        made = call_own(
            section.path, section.arguments, offered, section="model", key="path"
        )
    start = f"model.path={section.path!r} returned"
    if not isinstance(made, tuple) or len(made) != 3:
        raise InputError(
            f"{start} {shown(made)}; it must return three things, as models.load does: "
            "a Policy (models.policy_of makes one of a module), its parameters and a "
            "tokenizer."
        )
    policy, params, tokenizer = made
    if not isinstance(policy, Policy):
        raise InputError(
            f"{start} {type(policy).__name__} as its first thing, no Policy; "
            "models.policy_of makes one of a module."
        )
    leaves = jax.tree.leaves(params)
    if not leaves or not all(isinstance(x, jax.Array | np.ndarray) for x in leaves):
        raise InputError(
            f"{start} {shown(params)} as its second thing, no tree of arrays; "
            "policy.init(key) makes parameters."
        )
    _check_structure(policy, params, start)
    if not hasattr(tokenizer, "get_vocab"):
        raise InputError(
            f"{start} {shown(tokenizer)} as its third thing, no tokenizer of "
            "transformers."
        )
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > policy.vocab_size:
        raise InputError(
            f"{start} a tokenizer with {tokens} tokens and a policy with "
            f"{policy.vocab_size}; they do not belong together."
        )
    dtype = jnp.dtype(section.param_dtype)

    def cast(x):
        return jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else None)

    params = jax.tree.map(cast, params)
    if mesh is not None:
        axes, rules = policy.logical_axes, config.mesh.rules
        params = jax.device_put(params, param_shardings(params, axes, mesh, rules))
    return policy, params, tokenizer


def _check_structure(policy: Policy, params: chex.ArrayTree, start: str) -> None:
    """Parameters as `Policy.init` makes them; otherwise XLA would say it, later."""

    def shapes(tree):
        found = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): tuple(x.shape) for path, x in found}

    wanted = shapes(jax.eval_shape(policy.init, jax.random.key(0)))
    given = shapes(params)
    for name in sorted({*wanted, *given}):
        if wanted.get(name) != given.get(name):
            raise InputError(
                f"{start} parameters that policy.init does not make: {name} is "
                f"{given.get(name, 'missing')}, not {wanted.get(name, 'there')}."
            )


def save_own_model(
    config: Config, params: chex.ArrayTree, tokenizer: Any, path: str | os.PathLike[str]
) -> None:
    """Writes parameters by their dotted paths (`WEIGHTS`), the tokenizer, and in
    ``config.json`` the function that they belong to; replaces what was there.

    Args:
      config: that names the function.
      params: on the host.
      tokenizer: of transformers.
      path: the folder.
    """
    from safetensors.numpy import save_file

    flat = {
        ".".join(str(getattr(p, "key", getattr(p, "idx", p))) for p in place): x
        for place, x in jax.tree_util.tree_leaves_with_path(params)
    }
    with new_folder(path, overwrite=True) as folder:
        contiguous = {name: np.ascontiguousarray(x) for name, x in flat.items()}
        save_file(contiguous, folder / WEIGHTS)
        section = config.model
        write_json(
            folder / "config.json",
            {"path": section.path, "arguments": dict(section.arguments)},
        )
        tokenizer.save_pretrained(folder)
