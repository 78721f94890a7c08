"""Collectives and shapes in a compiled program's text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_post.preflight.hlo import collectives, widest_logits


def test_a_loops_collectives_count_as_often_as_it_runs():
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.shard_map(mesh=mesh, in_specs=P("a"), out_specs=P())
    def fn(x):
        def body(total, row):
            return total + jax.lax.psum(row, "a"), None

        zero = jnp.zeros(x.shape[1:])
        return jax.lax.scan(body, zero, x)[0]

    x = jax.ShapeDtypeStruct((20, 6), jnp.float32, sharding=NamedSharding(mesh, P("a")))
    text = jax.jit(fn).lower(x).compile().as_text()
    assert collectives(text) == {"all-reduce": {"count": 5, "bytes": 5 * 6 * 4}}


def test_a_loop_of_which_only_its_condition_tells():
    text = """\
%test (t: (s32[], f32[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  %other = s32[] constant(9)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %one = s32[] constant(1)
  %r = f32[4]{0} all-reduce(%x), to_apply=%add
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %far = s32[] constant(100)
  %w = (s32[], f32[4]) while(%x), condition=%test, body=%body
}"""
    assert collectives(text) == {"all-reduce": {"count": 7, "bytes": 7 * 16}}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "%s = (bf16[4]{0}, bf16[32]{0}) all-gather-start(bf16[4]{0} %x), "
            "dimensions={0}",
            {"all-gather": {"count": 1, "bytes": 64}},
        ),
        (
            "%s = ((f32[4], f32[2]), (f32[8], f32[4])) all-gather-start(%x, %y), "
            "dimensions={0}",
            {"all-gather": {"count": 1, "bytes": 48}},
        ),
        (
            "%s = (f32[4], f32[2]) all-reduce-start(%x, %y), to_apply=%add",
            {"all-reduce": {"count": 1, "bytes": 24}},
        ),
        (
            "%s = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%x)",
            {"collective-permute": {"count": 1, "bytes": 16}},
        ),
        ("%s = f32[4] all-gather-done(%x)", {}),
    ],
)
def test_asynchronous_collectives_count_once_and_by_their_results(line, found):
    assert collectives(f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  {line}\n}}") == found


def test_the_unembedding_is_no_logits():
    text = "bf16[96,32] f32[7,96] f32[3,3,48]"
    assert widest_logits(text, {96, 48}, {32}) == 9
    assert widest_logits(f"{text} f32[2,32,48]", {96, 48}, {32}) == 64
