"""One program, compiled from shapes, and what the compiler says of it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxrl_post.preflight.flops import count_flops
from jaxrl_post.preflight.hlo import collectives, widest_logits
from jaxrl_post.preflight.shapes import Shapes

_NEEDED = re.compile(r"Used ([\d.]+)([KMGT]?) of ")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      name: of the program.
      bytes: one chip's: ``arguments``, ``outputs``, ``aliases`` (outputs that take
        the place of arguments), ``temp``, ``code``, ``resident`` (what lies there and
        is no argument) and ``peak``, all of these with the aliases once; ``host``: in
        the host's memory.
      flops: of all chips: ``model``, ``compiled`` and their ``ratio`` (None where the
        model needs none). Loops whose length depends on data count once; there are
        ``unknown_loops`` of them.
      collectives: of one chip, by kind: ``count``, and ``bytes`` of results.
      times: how often a step runs it, as it is counted here.
      logits_rows: the most tokens that an array over the vocabulary has.
      seconds: that its compilation took.
      error: of a compiler that found no room; of `bytes` only ``peak`` is known then,
        as far as the compiler says it.
    """

    name: str
    bytes: dict[str, int]
    flops: dict[str, Any] = field(default_factory=dict)
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    times: float = 1
    logits_rows: int = 0
    seconds: float = 0.0
    error: str | None = None


def compile_program(
    name: str,
    jitted: Any,
    *arguments: Any,
    shapes: Shapes,
    resident: int,
    model: float = 0.0,
    times: float = 1,
    static: dict[str, Any] | None = None,
) -> tuple[Program, Any]:
    """Traces, compiles and measures a program.

    Args:
      name: for the report.
      jitted: with ``trace``, as `jax.jit` makes it.
      *arguments: shapes.
      shapes: of the run it belongs to.
      resident: bytes on a chip beside the arguments.
      model: operations that the model needs for it.
      times: how often a step runs it.
      static: keyword arguments.

    Returns:
      The program, and its results as shapes; None where there was no room for it.
    """
    start = time.perf_counter()
    with jax.set_mesh(shapes.mesh):
        traced = jitted.trace(*arguments, **(static or {}))
        flops, unknown = count_flops(traced.jaxpr)
        lowered = traced.lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return _too_large(name, str(error), resident, times), None
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliases": memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "resident": resident,
    }
    sizes["peak"] = sum(sizes.values()) - 2 * sizes["aliases"]
    sizes["host"] = (
        memory.host_argument_size_in_bytes
        + memory.host_output_size_in_bytes
        - memory.host_alias_size_in_bytes
        + memory.host_temp_size_in_bytes
    )
    text = compiled.as_text()
    program = Program(
        name=name,
        bytes=sizes,
        flops={
            "model": model,
            "compiled": flops,
            "ratio": flops / model if model else None,
            "unknown_loops": unknown,
        },
        collectives=collectives(text),
        times=times,
        logits_rows=_logits_rows(text, shapes),
        seconds=time.perf_counter() - start,
    )
    results = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        traced.out_info,
        compiled.output_shardings,
    )
    return program, results


def _logits_rows(text: str, shapes: Shapes) -> int:
    sizes, mesh = shapes.sizes, shapes.mesh
    parts = {1, *mesh.shape.values(), mesh.size}
    return widest_logits(
        text,
        {sizes.rows // mesh.shape["tensor"], sizes.rows},
        {sizes.hidden_size // n for n in parts},
    )


def _too_large(name: str, message: str, resident: int, times: float) -> Program:
    """What is known of a program that the compiler found no room for."""
    sizes = {"resident": resident}
    if found := _NEEDED.search(message):
        used = float(found[1]) * _UNITS[found[2]]
        sizes["peak"] = int(used) + resident
    line = " ".join(message.split())[:300]
    return Program(name, bytes=sizes, times=times, error=line)
