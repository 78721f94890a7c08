"""GGUF files, written here with llama.cpp's own package and its converter's rules."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from goldens import GOLDENS, NAMES
from safetensors.numpy import load_file

from jaxrl_post import models
from jaxrl_post.errors import InputError
from jaxrl_post.models.gguf import GGUFFile, byte_level_bpe
from jaxrl_post.models.kinds import rotations

SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct.gguf"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """convert_hf_to_gguf.py, LlamaModel.permute: half-split rows to interleaved."""
    parts = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return parts.swapaxes(1, 2).reshape(weight.shape)


ARCHITECTURES = {"qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
ARCHITECTURES |= {"olmo3": "olmo2", "mistral": "llama"}
NOT_IN_THE_FILE = {
    # what llama.cpp derives, and the goldens have otherwise; what it does not know
    "gemma2": {"query_scalar"},
    "gemma3_text": {"query_scalar"},
    "smollm3": {"unrotated_layers", "rope_scaling"},
    "mistral": {"family", "window", "local_layers", "rope_scaling"},
    "phi3": {"rope_scaling"},  # its factor of cosine and sine is written out
}


def write_settings(writer: gguf.GGUFWriter, config: dict) -> None:
    """The fields of a config, as llama.cpp's converter writes them."""
    kind = config["model_type"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope and kind != "mistral":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if "head_dim" in config and kind != "llama":
        writer.add_key_length(config["head_dim"])
    if kind in ("olmo3", "gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(config["sliding_window"] or 0)
    if kind in ("olmo3", "gemma3_text"):
        local = [kind == "sliding_attention" for kind in config["layer_types"]]
        writer.add_sliding_window_pattern(local)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if kind == "qwen3_moe":
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if kind == "phi3":
        writer.add_rope_dimension_count(6)
        factor = (1 + np.log(256 / 128) / np.log(128)) ** 0.5
        writer.add_rope_scaling_attn_factors(factor)
        for name in ("long", "short"):
            factors = np.array(rope[f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)
    if kind == "mistral":  # as LlamaModel writes Llama 3's scaling
        policy, _, _ = models.load(GOLDENS / "mistral")
        stretched = rotations(policy.config).frequencies[0]
        plain = 1e4 ** -(np.arange(6) / 6)
        writer.add_tensor("rope_freqs.weight", (plain / stretched).astype(np.float32))


def write(family: str, path: Path, kind: Type, leave_out: str = "") -> dict:
    """A golden model as GGUF; returns the tensors that are in it, de-quantised."""
    folder = GOLDENS / family
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES.get(config["model_type"], config["model_type"])
    known = gguf.MODEL_ARCH[arch.upper()]
    names = gguf.get_tensor_name_map(known, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, arch)
    write_settings(writer, config)
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v.astype(np.float32) for k, v in tensors.items() if k != leave_out}
    experts: dict[str, list] = {}  # one tensor for all of a layer
    for name in sorted(tensors):
        if match := re.fullmatch(r"(.*experts)\.\d+(\..*)", name):
            experts.setdefault(match[1] + match[2], []).append(tensors.pop(name))
    tensors |= {name: np.stack(parts) for name, parts in experts.items()}
    kept = {}
    for name, tensor in tensors.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if arch in ("llama", "smollm3") and name.endswith("q_proj.weight"):
            tensor = permute(tensor, config["num_attention_heads"])
        if arch in ("llama", "smollm3") and name.endswith("k_proj.weight"):
            tensor = permute(tensor, config["num_key_value_heads"])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        # blocks of 32 along the last axis, as llama.cpp needs them
        chosen = kind if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else Type.F32
        data = quantize(tensor, chosen)
        writer.add_tensor(theirs, data, raw_dtype=chosen)
        kept[name] = dequantize(data, chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


@pytest.mark.parametrize("family", NAMES)
def test_the_same_model(family, tmp_path):
    write(family, tmp_path / "m.gguf", Type.F32)
    policy, params, tokenizer = models.load(tmp_path / "m.gguf")
    expected, values, _ = models.load(GOLDENS / family)
    assert tokenizer is None
    left_out = NOT_IN_THE_FILE.get(family, ())
    for field, value in dataclasses.asdict(expected.config).items():
        found = getattr(policy.config, field)
        if isinstance(value, float):
            found = pytest.approx(found)
        assert field in left_out or found == value, field
    if family != "smollm3":
        found, known = rotations(policy.config), rotations(expected.config)
        for a, b in zip(found, known, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    close = np.testing.assert_array_equal
    if family.startswith("gemma"):  # 1 is added to norms there, and taken off here
        close = partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, params, values)


@pytest.mark.parametrize(
    "kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1], ids=lambda k: k.name
)
def test_types(kind, tmp_path):
    kept = write("qwen2", tmp_path / "m.gguf", kind)
    _, params, _ = models.load(tmp_path / "m.gguf")
    np.testing.assert_array_equal(params["embed"], kept["model.embed_tokens.weight"])
    up = kept["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(params["layers"]["mlp"]["up"]["kernel"][1], up.T)
    exact = load_file(GOLDENS / "qwen2" / "model.safetensors")
    error = np.abs(up - exact["model.layers.1.mlp.up_proj.weight"]).max()
    assert 0 < error < 0.15  # it was quantised, and not into noise


def write_blocks(path: Path, kind: Type, rows: int = 5, blocks: int = 2) -> np.ndarray:
    """A file with one matrix of random blocks, whatever these mean; its bytes."""
    size, width = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(kind.value)
    data = rng.integers(0, 256, (rows, blocks * width), np.uint8)
    writer = gguf.GGUFWriter(path, "qwen2")
    sizes = ("context_length", "block_count", "feed_forward_length")
    for key in (*sizes, "head_count", "head_count_kv"):
        getattr(writer, f"add_{key}")(1)
    writer.add_embedding_length(blocks * size)
    writer.add_tensor("token_embd.weight", np.zeros((1, blocks * size), np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return data


@pytest.mark.parametrize("kind", list(gguf.quants._type_traits), ids=lambda k: k.name)
def test_every_type_that_gguf_knows(kind, tmp_path):
    """Random bytes, read whole and in parts; scales among them may be no numbers."""
    data = write_blocks(tmp_path / "m.gguf", kind)
    file = GGUFFile(tmp_path / "m.gguf")
    name = "model.layers.0.mlp.up_proj.weight"
    with np.errstate(all="ignore"):
        expected = dequantize(data, kind)
        whole = file.read(name, (slice(None), slice(None)))
        part = file.read(name, (slice(1, 3), slice(7, 40)))
    assert file.problems == [] and file.shapes[name] == expected.shape
    assert np.isfinite(expected).any() and np.unique(expected).size > 2
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(part, expected[1:3, 7:40])


def k_quant(kind: Type, block: np.ndarray) -> np.ndarray:
    """256 weights of one block, bit by bit as ggml-common.h lays them out."""
    half = block.view(np.float16)
    if kind is Type.Q6_K:  # ql[128] qh[64] scales[16] d
        d, scales = np.float32(half[104]), block[192:208].view(np.int8)
        out = np.empty(256, np.float32)
        for i in range(256):
            part, inside = divmod(i, 128)
            quarter, lane = divmod(inside, 32)
            low = block[64 * part + 32 * (quarter % 2) + lane] >> 4 * (quarter // 2)
            high = block[128 + 32 * part + lane] >> 2 * quarter
            q = int(low & 15) + 16 * int(high & 3) - 32
            out[i] = d * np.float32(scales[i // 16]) * np.float32(q)
        return out
    # Q4_K: d dmin scales[12] qs[128]; Q5_K has qh[32] before qs
    d, dmin, s = np.float32(half[0]), np.float32(half[1]), block[4:16].astype(int)
    out = np.empty(256, np.float32)
    for i in range(256):
        j, lane = divmod(i, 32)
        if j < 4:
            scale, least = s[j] & 63, s[j + 4] & 63
        else:
            scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4
            least = s[j + 4] >> 4 | (s[j] >> 6) << 4
        start = 16 if kind is Type.Q4_K else 48
        q = int(block[start + 32 * (j // 2) + lane]) >> 4 * (j % 2) & 15
        if kind is Type.Q5_K:
            q += (int(block[16 + lane]) >> j & 1) * 16
        out[i] = d * np.float32(scale) * q - dmin * np.float32(least)
    return out


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q5_K, Type.Q6_K])
def test_k_quants_by_the_bit(kind, tmp_path):
    """The types of most files, derived from the format apart from the package."""
    data = write_blocks(tmp_path / "m.gguf", kind, rows=8, blocks=1)
    name = "model.layers.0.mlp.up_proj.weight"
    with np.errstate(all="ignore"):
        found = GGUFFile(tmp_path / "m.gguf").read(name, (slice(None), slice(None)))
        for row, block in zip(found, data, strict=True):
            np.testing.assert_allclose(row, k_quant(kind, block), rtol=1e-5, atol=1e-6)


def test_types_without_a_reader_are_named(tmp_path):
    write_blocks(tmp_path / "m.gguf", Type.Q8_K)
    assert GGUFFile(tmp_path / "m.gguf").problems == [
        "type Q8_K of model.layers.0.mlp.up_proj.weight cannot be de-quantised"
    ]


def test_a_vector_in_bfloat16(tmp_path):
    """Other writers than llama.cpp's quantise norms too."""
    name = "model.norm.weight"
    write("qwen2", tmp_path / "m.gguf", Type.F32, leave_out=name)
    vector = load_file(GOLDENS / "qwen2" / "model.safetensors")[name]
    rewritten = gguf.GGUFReader(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "n.gguf", "qwen2")
    for key, field in rewritten.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for t in rewritten.tensors:
        writer.add_tensor(t.name, t.data)
    writer.add_tensor(
        "output_norm.weight", quantize(vector, Type.BF16), raw_dtype=Type.BF16
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, params, _ = models.load(tmp_path / "n.gguf")
    rounded = dequantize(quantize(vector, Type.BF16), Type.BF16)
    np.testing.assert_array_equal(params["final_norm"]["scale"], rounded)


def test_missing_tensors_are_listed(tmp_path):
    write("llama", tmp_path / "m.gguf", Type.F32, "model.norm.weight")
    with pytest.raises(InputError, match="missing: model.norm.weight"):
        models.load(tmp_path / "m.gguf")


def test_no_gguf_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"not a model at all, only some text")
    with pytest.raises(InputError, match="is no GGUF file"):
        models.load(tmp_path / "m.gguf")


ALPHABET = [*"abcdefgh'.ĠĊ0123456789", "Ã", "©"]
MERGES = ["a b", "1 2", "12 3", "Ġ a"]


def tokenizer(pre: str, bos: str | None = None):
    tokens = [*ALPHABET, "ab", "12", "123", "Ġa", "<end>", "<think>", "[PAD]"]
    types = [1] * (len(tokens) - 3) + [3, 4, 5]
    return byte_level_bpe(tokens, MERGES, types, pre, bos)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["Ġa", "Ġ", "123", "4", "ab"]),
        ("smollm", ["Ġa", "Ġ", "1", "2", "3", "4", "ab"]),
        ("llama-bpe", ["Ġa", "Ġ", "123", "4", "ab"]),
        ("qwen2", ["Ġa", "Ġ", "1", "2", "3", "4", "ab"]),
    ],
)
def test_pre_tokenizers(pre, pieces):
    text = " a 1234ab"
    encoding = tokenizer(pre).encode(text)
    assert encoding.tokens == pieces
    assert tokenizer(pre).decode(encoding.ids) == text


def test_special_added_and_unused_tokens():
    built = tokenizer("gpt-2", bos="<end>")
    encoding = built.encode("ab<think>ab<end>é")
    assert encoding.tokens == ["<end>", "ab", "<think>", "ab", "<end>", "Ã", "©"]
    assert built.decode(encoding.ids) == "ab<think>abé"
    assert "[PAD]" not in built.get_vocab()


@pytest.mark.skipif(
    not SMOLLM2.exists(), reason="python scripts/get_smollm2.py was not run"
)
def test_smollm2_answers():
    policy, params, tokenizer = models.load(SMOLLM2)
    assert tokenizer.tokenize("12 apples") == ["1", "2", "Ġapples"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=False
    )

    @jax.jit
    def forward(params, tokens, positions, cache):
        ones = jnp.ones_like(tokens)
        hidden, cache = policy.hidden(params, tokens, positions, ones, cache)
        return jnp.argmax(hidden[0, -1] @ policy.unembedding(params).T), cache

    cache = policy.init_cache(1, len(ids) + 12)
    token, cache = forward(params, jnp.array([ids]), jnp.arange(len(ids))[None], cache)
    answer = []
    while int(token) not in models.stop_token_ids(policy, tokenizer):
        answer.append(int(token))
        position = jnp.full((1, 1), len(ids) + len(answer) - 1)
        token, cache = forward(params, token[None, None], position, cache)
    assert tokenizer.decode(answer) == "The capital of France is Paris."
