"""Frequencies of rotary embeddings, and the ways to stretch them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl_post.models.catalogue import Family

LOCAL, FULL = "sliding_attention", "full_attention"
"""Kinds of layers, as ``config.json`` names them."""

KINDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "yarn": (
        ("original_max_position_embeddings",),
        (
            *("factor", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        ),
    ),
    "llama3": (
        (
            *("factor", "low_freq_factor", "high_freq_factor"),
            "original_max_position_embeddings",
        ),
        (),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
}
"""By ``rope_type``: the keys that it must have, and those that it may have."""


def frequencies(
    dim: int,
    theta: float,
    scaling: Mapping[str, Any],
    max_positions: int,
    extended_positions: int | None = None,
) -> tuple[np.ndarray, float]:
    """Angles per position, and what cosine and sine are multiplied by.

    ``dynamic`` is the plain rotation up to `max_positions`; beyond, its frequencies
    would depend on the length of each sequence, and such sequences are refused
    elsewhere. ``longrope`` has a set for sequences up to the original length and one
    for longer ones; `max_positions` says which.

    Args:
      dim: rotated dimensions of a head, even.
      theta: base of the wavelengths.
      scaling: ``rope_type``, one of `KINDS`, and its numbers; empty: the plain one.
      max_positions: longest sequence there may be.
      extended_positions: ``max_position_embeddings`` where that is more.

    Returns:
      float32 ``[dim / 2]``, and the factor.

    Source: linear, dynamic and yarn: arXiv 2309.00071; longrope: arXiv 2402.13753;
    llama3: Llama 3.1. Names are those of transformers.

    >>> frequencies(4, 100.0, {"rope_type": "linear", "factor": 2.0}, 8)[0].tolist()
    [0.5, 0.05000000074505806]
    """
    plain = theta ** -(np.arange(0, dim, 2) / dim)
    kind = scaling.get("rope_type", "default")
    original = scaling.get("original_max_position_embeddings", max_positions)
    factor = scaling.get("factor") or (extended_positions or max_positions) / original
    multiplier = scaling.get("attention_factor")
    if kind == "linear":
        plain = plain / factor
    elif kind == "llama3":
        plain = _llama3(plain, factor, original, scaling)
    elif kind == "yarn":
        plain = _yarn(plain, theta, factor, original, scaling)
        if multiplier is None:
            multiplier = _yarn_multiplier(factor, scaling)
    elif kind == "longrope":
        longer = max_positions > original
        plain = plain / np.array(scaling["long_factor" if longer else "short_factor"])
        if multiplier is None and factor > 1:
            multiplier = math.sqrt(1 + math.log(factor) / math.log(original))
    return plain.astype(np.float32), float(multiplier or 1.0)


def _llama3(plain, factor, original, scaling):
    """Long waves stretched, short ones kept, those between mixed."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / factor)


def _yarn(plain, theta, factor, original, scaling):
    half = len(plain)

    def dimension(turns):
        """That makes so many turns within the original length."""
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low = dimension(scaling.get("beta_fast") or 32)
    high = dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = (np.arange(half) - low) / (high - low if high != low else 1e-3)
    stretched = np.clip(ramp, 0, 1)
    return plain * (1 - stretched + stretched / factor)


def _yarn_multiplier(factor, scaling) -> float:
    def grown(weight):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(over) / grown(under) if over and under else grown(1.0)


def rope_parts(
    values: Mapping[str, Any], family: Family
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The rotation's settings, and those of local layers where they have their own."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if family.nested_rope and {FULL, LOCAL} & given.keys():
        return given.get(FULL) or {}, given.get(LOCAL) or {}
    return given, {}


def read_rope(values: Mapping[str, Any], family: Family) -> tuple[dict, list[str]]:
    """The fields of `DecoderConfig` about rotations, and what is not supported."""
    full, local = rope_parts(values, family)
    theta = full.get("rope_theta", values.get("rope_theta", 1e4))
    positions = values.get("max_position_embeddings", 2048)
    out: dict[str, Any] = {"rope_theta": float(theta)}
    if family.nested_rope:
        default = values.get("rope_local_base_freq", theta)
        out["local_rope_theta"] = float(local.get("rope_theta", default))
    kinds = [r.get("rope_type", r.get("type", "default")) for r in (full, local)]
    kind = kinds[0]
    if family.fused and kind in ("su", "yarn"):  # names of Phi's own, earlier code
        kind = "longrope"
    problems = []
    if kind not in KINDS:
        problems.append(
            f"rope_type = {kind!r} is not supported, only {', '.join(KINDS)}"
        )
        return out, problems
    if kinds[1] != "default":
        problems.append(f"rope_type = {kinds[1]!r} of {LOCAL} is not supported")
    share = full.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if "partial_rotary" in family.keys:
        out["partial_rotary"] = float(share)
    elif share != 1:
        problems.append(f"partial_rotary_factor = {share!r} is not supported, only 1.0")
    if kind == "default":
        return out, problems
    scaling = {k: v for k, v in full.items() if v is not None and k != "type"}
    scaling = {k: tuple(v) if isinstance(v, list) else v for k, v in scaling.items()}
    original = "original_max_position_embeddings"
    if family.fused and original in values:  # which has priority in transformers too
        scaling[original] = values[original]
    elif original in KINDS[kind][0]:
        scaling.setdefault(original, positions)
    for key in ("rope_theta", "partial_rotary_factor", "rope_type"):
        scaling.pop(key, None)
    needed, optional = KINDS[kind]
    if missing := [key for key in needed if key not in scaling]:
        problems.append(f"rope_type = {kind!r} lacks {', '.join(missing)}")
    if unknown := [key for key in scaling if key not in needed + optional]:
        problems.append(
            f"{', '.join(unknown)} of rope_type = {kind!r} is not supported, only "
            + ", ".join(needed + optional)
        )
    problems += _wrong_scaling(scaling, values, out.get("partial_rotary", 1.0))
    out["rope_scaling"] = (("rope_type", kind), *sorted(scaling.items()))
    if kind == "longrope" and not problems and scaling[original] < positions:
        out |= {"max_positions": scaling[original], "extended_positions": positions}
    return out, problems


def is_positive(x: Any) -> bool:
    return type(x) in (int, float) and 0 < x < 1e30


def _wrong_scaling(scaling, values, share: float) -> list[str]:
    """Numbers of a rotation that are none."""
    heads = values["num_attention_heads"]
    dim = values.get("head_dim", values["hidden_size"] // heads)
    problems = []
    for key, value in scaling.items():
        if key in ("short_factor", "long_factor"):
            fits = isinstance(value, tuple) and all(map(is_positive, value))
            if not fits or len(value) != int(dim * share) // 2:
                problems.append(f"{key} is no list of {int(dim * share) // 2} factors")
        elif key == "truncate":
            if type(value) is not bool:
                problems.append(f"{key} = {value!r:.80} is not true or false")
        elif not is_positive(value):
            problems.append(f"{key} = {value!r:.80} is not a positive number")
    return problems
