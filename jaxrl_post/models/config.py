"""The numbers that define a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderConfig:
    """Llama's layout, with the options of the families in `models.catalogue`.

    Attributes:
      family: one of `catalogue.FAMILIES`; decides names in files only.
      vocab_size: number of tokens that exist.
      padded_vocab_size: rows of the embedding, at least `vocab_size`.
      hidden_size: model width D.
      intermediate_size: width of the gated MLP.
      num_layers, num_heads, num_kv_heads, head_dim: as the names say; `num_heads`
        is a multiple of `num_kv_heads` (grouped-query attention).
      rope_theta: base of the rotary embedding's wavelengths.
      rope_scaling: pairs of a ``rope_type`` and its numbers, as ``config.json`` has
        them; see `rope.KINDS`.
      local_rope_theta: base in the `local_layers`, which are then not scaled; None:
        they rotate as the others do.
      partial_rotary: share of each head's dimensions that is rotated, the first ones.
      unrotated_layers: numbers of the layers without rotation (NoPE).
      window: slots that a token of a local layer sees, its own included.
      local_layers: numbers of the layers with a window.
      rms_norm_eps: added to the mean square before its root.
      norm_offset: added to the scales of norms (Gemma: 1).
      pre_norm, post_norm: norms before, and behind, attention and MLP.
      tie_embeddings: the unembedding is the embedding.
      scale_embeddings: embeddings are multiplied by ``sqrt(D)`` (Gemma).
      qkv_bias: biases on query, key and value projections (Qwen2).
      qk_norm: RMSNorm of every query and key head before the rotation (Qwen3).
      joint_qk_norm: that norm is over all heads at once (OLMo).
      query_scalar: attention's scores are divided by its root; None: `head_dim`.
      attention_softcap: ``c`` where attention's scores are ``c * tanh(scores / c)``.
      logit_softcap: ``c`` where logits are ``c * tanh(logits / c)``.
      activation: ``"silu"``, or ``"gelu_tanh"``, of the gate of the MLP.
      num_experts: experts per layer in the place of the MLP; None: none.
      experts_per_token: that the router chooses.
      expert_size: width of each.
      normalise_experts: weights of the chosen ones are made to sum to 1.
      max_positions: longest sequence that the model, as it rotates, was made for.
      extended_positions: what the file says where that is more (longrope).
      stop_token_ids: tokens that end an answer, as the checkpoint's files say.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    padded_vocab_size: int | None = None
    family: str = "llama"
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 2048
    stop_token_ids: tuple[int, ...] = ()
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    local_rope_theta: float | None = None
    partial_rotary: float = 1.0
    unrotated_layers: tuple[int, ...] = ()
    window: int | None = None
    local_layers: tuple[int, ...] = ()
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    scale_embeddings: bool = False
    joint_qk_norm: bool = False
    query_scalar: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    activation: str = "silu"
    num_experts: int | None = None
    experts_per_token: int = 0
    expert_size: int = 0
    normalise_experts: bool = False
    extended_positions: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}; grouped-query attention needs it."
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"head_dim={self.head_dim} must be even for rotations."
                if self.partial_rotary == 1
                else f"partial_rotary={self.partial_rotary} of head_dim="
                f"{self.head_dim} is no even number of dimensions."
            )
        if self.padded_vocab_size is None:
            object.__setattr__(self, "padded_vocab_size", self.vocab_size)
        if self.rows < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size={self.padded_vocab_size} is below "
                f"vocab_size={self.vocab_size}."
            )
        if self.local_layers and not self.window:
            raise ValueError(f"local_layers={self.local_layers} have no window.")
        if self.num_experts and not 0 < self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} of "
                f"num_experts={self.num_experts}: at least 1 and no more than all."
            )

    @property
    def rows(self) -> int:
        """Rows of the embedding matrix, padding included."""
        return self.padded_vocab_size or self.vocab_size

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that are rotated."""
        return int(self.head_dim * self.partial_rotary)
