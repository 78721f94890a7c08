"""The numbers that define a decoder of the Llama layout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderConfig:
    """Llama's layout, with the options of Qwen2 and Qwen3.

    Attributes:
      family: ``"llama"``, ``"qwen2"`` or ``"qwen3"``; decides names in files only.
      vocab_size: number of tokens that exist.
      padded_vocab_size: rows of the embedding, at least `vocab_size`.
      hidden_size: model width D.
      intermediate_size: width of the gated MLP.
      num_layers, num_heads, num_kv_heads, head_dim: as the names say; `num_heads`
        is a multiple of `num_kv_heads` (grouped-query attention).
      rope_theta: base of the rotary embedding's wavelengths.
      rms_norm_eps: added to the mean square before its root.
      tie_embeddings: the unembedding is the embedding.
      qkv_bias: biases on query, key and value projections (Qwen2).
      qk_norm: RMSNorm of every query and key head before the rotation (Qwen3).
      max_positions: longest sequence that the model was made for.
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

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}; grouped-query attention needs it."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotations.")
        if self.padded_vocab_size is None:
            object.__setattr__(self, "padded_vocab_size", self.vocab_size)
        if self.rows < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size={self.padded_vocab_size} is below "
                f"vocab_size={self.vocab_size}."
            )

    @property
    def rows(self) -> int:
        """Rows of the embedding matrix, padding included."""
        return self.padded_vocab_size or self.vocab_size
