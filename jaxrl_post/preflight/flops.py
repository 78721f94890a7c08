"""Floating-point operations of a traced program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.extend.core import Literal

_KNOWN_UP_TO = 2**16
"""Elements up to which an array's values are followed, for trip counts and masks."""


def count_flops(closed: Any) -> tuple[float, int]:
    """Operations of all matrix products of a program, and loops of unknown length.

    Two for each multiplication and addition of a `dot_general`, or of a ragged one,
    whose rows count for their own group; nothing else counts.
    Bodies of loops count as often as they run: a scan's length, a counted loop's bounds
    where they follow from constants, such as blocks that a causal mask leaves out. A
    loop whose end depends on data counts once and is among the unknown. What each
    device of a `shard_map` does counts for each.

    Args:
      closed: a closed jaxpr, as ``jax.jit(f).trace(...).jaxpr`` has it.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> def f(x):
    ...     return jax.lax.scan(lambda c, _: (c @ x, None), x, length=5)[0]
    >>> count_flops(jax.make_jaxpr(f)(jnp.ones((3, 3))))
    (270.0, 0)
    """
    counter = _Counter()
    known = [x if np.size(x) <= _KNOWN_UP_TO else None for x in closed.consts]
    flops, _ = counter.count(closed.jaxpr, known, [None] * len(closed.jaxpr.invars))
    return float(flops), counter.unknown


class _Counter:
    """Walks jaxprs, and follows the values of small arrays that are constants."""

    def __init__(self) -> None:
        self.unknown = 0

    def count(self, jaxpr, consts, arguments) -> tuple[float, list[Any]]:
        """Operations, and the known ones among the results; None: not known."""
        env: dict[Any, Any] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, arguments, strict=True))

        def read(x):
            return x.val if isinstance(x, Literal) else env.get(x)

        total = 0.0
        for eqn in jaxpr.eqns:
            flops, results = self._equation(eqn, [read(x) for x in eqn.invars])
            total += flops
            env.update(zip(eqn.outvars, results, strict=True))
        return total, [read(x) for x in jaxpr.outvars]

    def _equation(self, eqn, inputs) -> tuple[float, list[Any]]:
        name, params = eqn.primitive.name, eqn.params
        nothing = [None] * len(eqn.outvars)
        if name == "dot_general":
            return _dot(eqn), nothing
        if name == "ragged_dot_general":
            return _ragged_dot(eqn), nothing
        if name == "scan":
            return self._scan(eqn, inputs), nothing
        if name == "while":
            return self._while(eqn, inputs), nothing
        if name == "cond":
            counts = [
                self._closed(branch, inputs[1:])[0] for branch in params["branches"]
            ]
            return max(counts), nothing
        if name == "pallas_call":
            return self._kernel(eqn, inputs), nothing
        if name.startswith("dot_product_attention"):
            return _fused_attention(eqn), nothing
        if name == "shard_map":
            axes = params.get("newly_manual_axes", params.get("manual_axes"))
            devices = math.prod(params["mesh"].shape[axis] for axis in axes)
            known = [x if np.ndim(x) == 0 else None for x in inputs]
            # A constant that is not split is the same inside.
            for i, spec in enumerate(params["in_specs"]):
                if not any(spec):
                    known[i] = inputs[i]
            flops, _ = self._closed(params["jaxpr"], known)
            return flops * devices, nothing
        for inner in _inner(params):
            flops, results = self._closed(inner, inputs)
            return flops, results if len(results) == len(nothing) else nothing
        if inputs and all(x is not None for x in inputs) or name == "iota":
            return 0.0, _evaluate(eqn, inputs)
        return 0.0, nothing

    def _closed(self, jaxpr, inputs) -> tuple[float, list[Any]]:
        consts = getattr(jaxpr, "consts", ())
        known = [x if np.size(x) <= _KNOWN_UP_TO else None for x in consts]
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        if len(inner.invars) != len(inputs):
            inputs = [None] * len(inner.invars)
        return self.count(inner, known, inputs)

    def _scan(self, eqn, inputs) -> float:
        params = eqn.params
        length, body = params["length"], params["jaxpr"]
        # Told by their axes, for jax 0.12 does not name their numbers any more: what
        # the loop walks along has one less inside.
        inner = getattr(body, "jaxpr", body)
        carry = _as_many_axes(eqn.outvars, inner.outvars)
        first = _as_many_axes(eqn.invars, inner.invars)
        fixed = inputs[: first - carry] + [None] * carry
        rows = inputs[first:]
        if all(x is None for x in rows) or not self._has_loop(body):
            return length * self._closed(body, fixed + [None] * len(rows))[0]
        total = 0.0
        for i in range(length):
            now = [None if x is None else np.asarray(x)[i] for x in rows]
            total += self._closed(body, fixed + now)[0]
        return total

    def _has_loop(self, closed) -> bool:
        """Whether a loop with a bound of its own is inside."""
        for eqn in getattr(closed, "jaxpr", closed).eqns:
            if eqn.primitive.name == "while":
                return True
            inner = [*_inner(eqn.params), *eqn.params.get("branches", ())]
            if any(map(self._has_loop, inner)):
                return True
        return False

    def _while(self, eqn, inputs) -> float:
        params = eqn.params
        before = params["cond_nconsts"]
        consts = inputs[before : before + params["body_nconsts"]]
        carry = inputs[before + params["body_nconsts"] :]
        trips = _trips(params["cond_jaxpr"].jaxpr, inputs[:before], carry)
        body, _ = self._closed(params["body_jaxpr"], consts + [None] * len(carry))
        if trips is None:
            self.unknown += bool(body)
            return body
        return trips * body

    def _kernel(self, eqn, inputs) -> float:
        """A Pallas kernel: its products at every point of its grid.

        Of splash attention only the blocks that its mask leaves: those are told by a
        small array of int8, 0 at blocks left out.
        """
        grid = math.prod(eqn.params["grid_mapping"].grid)
        masks = [np.asarray(x) for x in inputs if x is not None and np.ndim(x) >= 3]
        shares = [(x != 0).mean() for x in masks if x.dtype == np.int8]
        inner = eqn.params["jaxpr"]
        each, _ = self.count(inner, [], [None] * len(inner.invars))
        return grid * each * (shares[0] if shares else 1.0)


def _divide(x, y):
    """As `lax.div`, which cuts towards zero."""
    return np.trunc(x / y).astype(x.dtype) if x.dtype.kind in "iu" else x / y


_PLAIN: Mapping[str, Callable[..., Any]] = {
    "add": np.add,
    "and": np.logical_and,
    "convert_element_type": lambda x: x,
    "copy": lambda x: x,
    "div": _divide,
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "pvary": lambda x: x,
    "rem": np.fmod,
    "reshard": lambda x: x,
    "select_n": lambda which, *cases: np.choose(which, cases),
    "sign": np.sign,
    "sub": np.subtract,
}
"""What bounds of loops are computed by. NumPy: jax would want the program's devices."""


def _evaluate(eqn, inputs) -> list[Any]:
    """A small array that follows from known ones; None where it does not."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    unknown = [None] * len(eqn.outvars)
    if len(unknown) > 1 or math.prod(getattr(out, "shape", (2**40,))) > _KNOWN_UP_TO:
        return unknown
    try:
        dtype = np.dtype(out.dtype)
    except TypeError:  # such as that of random keys
        return unknown
    values = [np.asarray(x) for x in inputs]
    if name == "iota":
        return [np.indices(out.shape)[eqn.params["dimension"]].astype(dtype)]
    if name in ("reshape", "squeeze"):
        return [values[0].reshape(out.shape)]
    if name == "broadcast_in_dim":
        kept = eqn.params["broadcast_dimensions"]
        shape = [1] * len(out.shape)
        for axis, size in zip(kept, values[0].shape, strict=True):
            shape[axis] = size
        return [np.broadcast_to(values[0].reshape(shape), out.shape)]
    if name not in _PLAIN:
        return unknown
    return [np.asarray(_PLAIN[name](*values)).astype(dtype)]


def _inner(params: Mapping[str, Any]) -> list[Any]:
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    return [params[name] for name in names if name in params]


def _dot(eqn) -> float:
    (contract, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    inner = math.prod(left[axis] for axis in contract)
    return 2.0 * inner * math.prod(eqn.outvars[0].aval.shape)


def _ragged_dot(eqn) -> float:
    """Of each row with the matrix of its own group."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, _), _ = numbers.dot_dimension_numbers
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    flops = 2.0 * math.prod(left[axis] for axis in contract) * math.prod(out)
    by_rows = set(numbers.lhs_ragged_dimensions) <= set(contract)
    return flops / out[0] if by_rows else flops  # each row adds to one group's sum


def _fused_attention(eqn) -> float:
    """cuDNN's: two products forward, five backward, half of them under causality."""
    batch, time, heads, dim = eqn.invars[0].aval.shape
    slots = eqn.invars[1].aval.shape[1]
    products = 5 if "bwd" in eqn.primitive.name else 2
    causal = "CAUSAL" in str(eqn.params.get("mask_type", "")).upper()
    return products * 2.0 * batch * heads * time * slots * dim * (0.5 if causal else 1)


def _trips(condition, consts, carry) -> int | None:
    """How often a counted loop runs whose condition is ``i < n``; None: not known."""
    if len(condition.eqns) != 1 or condition.eqns[0].primitive.name != "lt":
        return None
    env = dict(zip(condition.invars, [*consts, *carry], strict=True))
    values = [
        x.val if isinstance(x, Literal) else env.get(x)
        for x in condition.eqns[0].invars
    ]
    first, end = values
    if first is None or end is None:
        return None
    return max(0, int(end) - int(first))


def _as_many_axes(outside, inside) -> int:
    """How many of a loop's variables are the same outside and inside."""
    pairs = zip(outside, inside, strict=True)
    return sum(x.aval.ndim == y.aval.ndim for x, y in pairs)
