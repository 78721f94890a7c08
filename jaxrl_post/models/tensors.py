"""The table of tensors: for every leaf of the parameter tree, where files have it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from jaxrl_post.models.catalogue import FAMILIES
from jaxrl_post.models.config import DecoderConfig

Index = tuple[slice, ...]


@dataclass(frozen=True)
class TensorRule:
    """Where one leaf of the parameter tree is stored.

    A file has matrices ``[outputs, inputs]`` with heads and their dimensions in one
    axis; the leaf has an axis for each.

    Attributes:
      path: keys from the tree's root to the leaf.
      name: the tensor's name, with ``{layer}`` where every layer has one.
      outputs: sizes of the axes that make the tensor's rows.
      inputs: sizes of the axes that make its columns; empty for a vector.
      transposed: the leaf is ``[*inputs, *outputs]``, else ``[*outputs, *inputs]``.
      experts: number of tensors that the leaf stacks behind the layers' axis, where
        the name has ``{expert}``.
      start, rows: the leaf is the rows from `start` on of a tensor of so many `rows`;
        0: all of it.
    """

    path: tuple[str, ...]
    name: str
    outputs: tuple[int, ...]
    inputs: tuple[int, ...] = ()
    transposed: bool = True
    experts: int = 0
    start: int = 0
    rows: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf, of one tensor's part where several are stacked."""
        first, last = self.outputs, self.inputs
        return last + first if self.transposed else first + last

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        sizes = [math.prod(axes) for axes in (self.outputs, self.inputs) if axes]
        return (self.rows or sizes[0], *sizes[1:])

    @property
    def per_layer(self) -> bool:
        """Whether the leaf stacks one tensor per layer."""
        return "{layer}" in self.name

    def stacked(self, layers: int) -> tuple[int, ...]:
        """Sizes of the leaf's axes before `shape`, in a model of so many layers."""
        return (layers,) * self.per_layer + (self.experts,) * bool(self.experts)

    def names(self, layers: int) -> dict[tuple[int, ...], str]:
        """The tensors' names, by their place in the stacked axes."""
        axes = ("layer",) * self.per_layer + ("expert",) * bool(self.experts)
        return {
            at: self.name.format(**dict(zip(axes, at, strict=True)))
            for at in np.ndindex(*self.stacked(layers))
        }

    def to_file(self, leaf: np.ndarray) -> np.ndarray:
        """The tensor as the file has it, or its rows from `start` on."""
        if self.transposed:
            inputs = tuple(range(len(self.inputs)))
            leaf = np.moveaxis(leaf, inputs, tuple(i - len(inputs) for i in inputs))
        own = replace(self, rows=0).file_shape
        return np.ascontiguousarray(leaf.reshape(own))

    def file_index(self, index: Index) -> Index:
        """The part of the file's tensor to read for `index` into the leaf.

        Of heads times dimensions, whole heads: `from_file` cuts the rest.
        """
        outputs, inputs = self._split(index)
        rows = _first_axis(outputs, self.outputs, self.start)
        return rows + _first_axis(inputs, self.inputs)

    def from_file(self, block: np.ndarray, index: Index) -> np.ndarray:
        """The leaf's part `index` from what was read at `file_index`."""
        outputs, inputs = self._split(index)
        axes = [
            size if i else len(range(*part[0].indices(size)))
            for part, sizes in ((outputs, self.outputs), (inputs, self.inputs))
            for i, size in enumerate(sizes)
        ]
        cut = [
            part if i else slice(None)
            for parts in (outputs, inputs)
            for i, part in enumerate(parts)
        ]
        block = block.reshape(axes)[tuple(cut)]
        if self.transposed:
            outputs_at = tuple(range(len(self.outputs)))
            block = np.moveaxis(
                block, outputs_at, tuple(i - len(outputs_at) for i in outputs_at)
            )
        return block

    def _split(self, index: Index) -> tuple[Index, Index]:
        count = len(self.inputs) if self.transposed else len(self.outputs)
        first, last = tuple(index[:count]), tuple(index[count:])
        return (last, first) if self.transposed else (first, last)


def _first_axis(index: Index, sizes: tuple[int, ...], after: int = 0) -> Index:
    """`index` on the first of axes that are flattened into one, the others whole."""
    if not sizes:
        return ()
    start, stop, _ = index[0].indices(sizes[0])
    inner = math.prod(sizes[1:])
    return (slice(after + start * inner, after + stop * inner),)


_NORMS = {  # by pre_norm and post_norm
    (True, False): {"attention": "input", "mlp": "post_attention"},
    (False, True): {"attention_post": "post_attention", "mlp_post": "post_feedforward"},
    (True, True): {
        **{"attention": "input", "attention_post": "post_attention"},
        **{"mlp": "pre_feedforward", "mlp_post": "post_feedforward"},
    },
}


def tensor_rules(config: DecoderConfig) -> Iterator[TensorRule]:
    """One rule for every leaf of the tree that `stack.decoder` builds for `config`."""
    width, mlp = (config.hidden_size,), (config.intermediate_size,)
    heads = (config.num_heads, config.head_dim)
    kv_heads = (config.num_kv_heads, config.head_dim)

    def embedding(leaf, name):
        return TensorRule((leaf,), name, (config.rows,), width, transposed=False)

    yield embedding("embed", "model.embed_tokens.weight")
    if not config.tie_embeddings:
        yield embedding("unembed", "lm_head.weight")
    yield TensorRule(("final_norm", "scale"), "model.norm.weight", width)

    def layer(path, name, *sizes):
        full = ("layers", *path.split("."))
        return TensorRule(full, "model.layers.{layer}." + name, *sizes)

    def projections(module, fused, **parts):
        """Matrices with the same inputs, in a tensor each or in one."""
        rows = sum(math.prod(outputs) for _, outputs in parts.values())
        start = 0
        for part, (name, outputs) in parts.items():
            path = f"{module}.{part}.kernel"
            if fused is None:
                yield layer(path, f"{name}_proj.weight", outputs, width)
                continue
            rule = layer(path, f"{fused}_proj.weight", outputs, width)
            yield replace(rule, start=start, rows=rows)
            start += math.prod(outputs)

    family = FAMILIES.get(config.family)
    fused = family is not None and family.fused
    for norm, name in _NORMS[config.pre_norm, config.post_norm].items():
        yield layer(f"{norm}_norm.scale", f"{name}_layernorm.weight", width)
    yield from projections(
        "attention",
        "self_attn.qkv" if fused else None,
        q=("self_attn.q", heads),
        k=("self_attn.k", kv_heads),
        v=("self_attn.v", kv_heads),
    )
    for part, features in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        if config.qkv_bias:
            name = f"self_attn.{part}_proj.bias"
            yield layer(f"attention.{part}.bias", name, features)
        if config.qk_norm and part != "v":
            name = f"self_attn.{part}_norm.weight"
            normed = features if config.joint_qk_norm else features[1:]
            yield layer(f"attention.{part}_norm.scale", name, normed)
    yield layer("attention.o.kernel", "self_attn.o_proj.weight", width, heads)
    if not config.num_experts:
        yield from projections(
            "mlp",
            "mlp.gate_up" if fused else None,
            gate=("mlp.gate", mlp),
            up=("mlp.up", mlp),
        )
        yield layer("mlp.down.kernel", "mlp.down_proj.weight", width, mlp)
        return
    yield layer("mlp.router", "mlp.gate.weight", (config.num_experts,), width)
    inner = (config.expert_size,)
    for part, outputs, inputs in (
        ("gate", inner, width),
        ("up", inner, width),
        ("down", width, inner),
    ):
        name = f"mlp.experts.{{expert}}.{part}_proj.weight"
        rule = layer(f"mlp.{part}.kernel", name, outputs, inputs)
        yield replace(rule, experts=config.num_experts)
