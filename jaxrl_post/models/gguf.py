"""GGUF files (llama.cpp's format): weights de-quantised, the tokenizer rebuilt.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors of any
type that the `gguf` package de-quantises can be read, all K-quants among them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_post.errors import InputError
from jaxrl_post.models.checkpoints import quiet_import
from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.families import config_from_hf
from jaxrl_post.models.ggufconfig import ROPE_TENSORS, config_values
from jaxrl_post.models.ggufheader import check_header
from jaxrl_post.models.tensors import Index

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
_OTHERWISE = {
    "gemma2": {"ffn_norm": "pre_feedforward_layernorm"},
    "gemma3": {"ffn_norm": "pre_feedforward_layernorm"},
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
}
"""By architecture, what some names mean there."""

_UNUSED, _CONTROL, _USER_DEFINED = 5, 3, 4  # tokenizer.ggml.token_type

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
_PRE_TOKENIZERS = ("default", "gpt-2", "llama-bpe", "qwen2", "smollm")


class GGUFFile:
    """One ``.gguf`` file; a `models.checkpoints.Checkpoint`."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.source = str(path)
        try:
            check_header(path)
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise InputError(
                f"{path} is no GGUF file, or not a whole one: {error}. Fetch it anew."
            ) from error
        self._fields = reader.fields
        arch = str(self._value("general.architecture"))
        names = _NAMES | _OTHERWISE.get(arch, {})
        self._tensors: dict[str, _Tensor] = {}
        self._factors: dict[str, list[float]] = {}
        for t in reader.tensors:
            plain = t.tensor_type == gguf.GGMLQuantizationType.F32
            if plain and t.name in ROPE_TENSORS:
                self._factors[t.name] = t.data.tolist()
                continue
            name = _name(t.name, names)
            if "{expert}" not in name:
                self._tensors[name] = _Tensor(t.tensor_type, t.data, t.shape)
                continue
            for i, data in enumerate(t.data):  # one matrix for each
                part = _Tensor(t.tensor_type, data, t.shape[:-1])
                self._tensors[name.format(expert=i)] = part

    @cached_property
    def config(self) -> DecoderConfig:
        values = config_values(self._value, self._factors, self.source)
        values["vocab_size"] = self.shapes.get("model.embed_tokens.weight", (None,))[0]
        values["tie_word_embeddings"] = "lm_head.weight" not in self.shapes
        values["eos_token_id"] = self._value("tokenizer.ggml.eos_token_id")
        return config_from_hf(values, self.source)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        # GGUF writes the fastest axis first
        return {
            k: tuple(int(n) for n in t.shape[::-1]) for k, t in self._tensors.items()
        }

    @cached_property
    def problems(self) -> list[str]:
        from gguf.quants import dequantize

        # of a vector all, of which a part is no whole block
        samples = {
            t.kind: t.data[:1] if t.data.ndim > 1 else t.data
            for t in self._tensors.values()
        }
        unreadable = set()
        for kind, sample in samples.items():
            try:
                dequantize(sample, kind)
            except (NotImplementedError, ValueError):
                unreadable.add(kind)
        return [
            f"type {t.kind.name} of {name} cannot be de-quantised"
            for name, t in self._tensors.items()
            if t.kind in unreadable
        ]

    def read(self, name: str, index: Index) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        if tensor.data.ndim == 1:
            # llama.cpp's converter adds what the family's norms add
            return dequantize(tensor.data, tensor.kind)[index] - self.config.norm_offset
        rows = dequantize(tensor.data[index[0]], tensor.kind)
        # llama.cpp's converter reorders the rows of query and key heads for its
        # interleaved rotation, of these architectures only
        permuted = self.config.family in ("llama", "smollm3")
        if permuted and re.search(r"self_attn\.[qk]_proj", name):
            rows = half_split_rows(rows, self.config.head_dim)
        return rows[:, *index[1:]]

    def tokenizer(self) -> Any | None:
        if "tokenizer.ggml.tokens" not in self._fields:
            return None
        fields = ("model", "pre", "tokens", "token_type", "merges", "add_bos_token")
        parts = {name: self._value(f"tokenizer.ggml.{name}") for name in fields}
        if parts["model"] != "gpt2" or parts["pre"] not in (None, *_PRE_TOKENIZERS):
            raise InputError(
                f"{self.source}: tokenizer {parts['model']!r} with pre-tokenizer "
                f"{parts['pre']!r} is not supported; 'gpt2' (byte-level BPE) with "
                f"{', '.join(_PRE_TOKENIZERS)} is. Use the model's Hugging Face folder."
            )
        tokens = parts["tokens"]
        self._check_tokens(parts)
        special = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            token = self._value(f"tokenizer.ggml.{key}_token_id")
            if token is not None:
                if type(token) is not int or not 0 <= token < len(tokens):
                    raise InputError(
                        f"{self.source}: tokenizer.ggml.{key}_token_id is {token}; "
                        f"there are {len(tokens)} tokens."
                    )
                special[f"{name}_token"] = tokens[token]
        bos = special.get("bos_token") if parts["add_bos_token"] else None
        with quiet_import():
            from transformers import PreTrainedTokenizerFast
        try:
            built = byte_level_bpe(
                tokens, parts["merges"], parts["token_type"], parts["pre"], bos
            )
        except Exception as error:  # of the tokenizers package: no type of its own
            raise InputError(
                f"{self.source}: the tokenizer cannot be made of the file's tokens and "
                f"merges: {error}"
            ) from error
        return PreTrainedTokenizerFast(
            tokenizer_object=built,
            chat_template=self._value("tokenizer.chat_template"),
            model_max_length=self.config.max_positions,
            clean_up_tokenization_spaces=False,
            **special,
        )

    def _check_tokens(self, parts: Mapping[str, Any]) -> None:
        tokens, merges, types = (parts[k] for k in ("tokens", "merges", "token_type"))
        for name, values, kind in (
            ("tokens", tokens, str),
            ("merges", merges, str),
            ("token_type", types, int),
        ):
            if not isinstance(values, list) or not {*map(type, values)} <= {kind}:
                raise InputError(
                    f"{self.source}: tokenizer.ggml.{name} is no list of "
                    f"{'texts' if kind is str else 'integers'}."
                )
        if not tokens or len(types) != len(tokens):
            raise InputError(
                f"{self.source}: {len(tokens)} tokens have {len(types)} types."
            )
        template = self._value("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise InputError(f"{self.source}: tokenizer.chat_template is no text.")

    def _value(self, key: str) -> Any:
        field = self._fields.get(key)
        try:
            return None if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.source}: {key} is no text: {error}") from error


def half_split_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of heads from llama.cpp's interleaved rotary order to the half-split one.

    Row ``2 i + h`` of a head becomes row ``h * head_dim / 2 + i``.

    >>> half_split_rows(np.arange(6)[:, None], head_dim=6).ravel().tolist()
    [0, 2, 4, 1, 3, 5]
    """
    heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def byte_level_bpe(
    tokens: list[str],
    merges: list[str],
    token_types: list[int],
    pre_tokenizer: str | None,
    bos: str | None = None,
) -> Any:
    """A `tokenizers.Tokenizer` as the family's own ``tokenizer.json`` defines it.

    Args:
      tokens: the vocabulary in the order of ids; unused entries are left out.
      merges: pairs, ``"a b"``, best first.
      token_types: llama.cpp's type of each token.
      pre_tokenizer: llama.cpp's name of the rule that splits text before merging.
      bos: token to put before every text, or None.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre
    from tokenizers.processors import TemplateProcessing

    vocab = {t: i for i, t in enumerate(tokens) if token_types[i] != _UNUSED}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(
        models.BPE(vocab, pairs, ignore_merges=pre_tokenizer == "llama-bpe")
    )
    if pre_tokenizer in ("llama-bpe", "qwen2"):
        split = _QWEN2_SPLIT if pre_tokenizer == "qwen2" else _LLAMA3_SPLIT
        steps = [
            pre.Split(Regex(split), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        digits = [pre.Digits(individual_digits=True)] * (pre_tokenizer == "smollm")
        steps = [*digits, pre.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre.Sequence(steps)
    if pre_tokenizer == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    for kind, add in (
        (_CONTROL, tokenizer.add_special_tokens),
        (_USER_DEFINED, tokenizer.add_tokens),
    ):
        added = [t for t, i in vocab.items() if token_types[i] == kind]
        add([AddedToken(t, normalized=False, special=kind == _CONTROL) for t in added])
    if bos is not None:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, vocab[bos])],
        )
    return tokenizer


@dataclass(frozen=True)
class _Tensor:
    """A tensor, or one expert's part of it; its shape has the fastest axis first."""

    kind: Any
    data: np.ndarray
    shape: np.ndarray


def _name(theirs: str, names: Mapping[str, str]) -> str:
    """``blk.3.attn_q.weight`` as transformers names it; unknown names stay."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", theirs)
    if not match or match[2] not in names:
        return theirs
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{names[match[2]]}.{match[3]}"
