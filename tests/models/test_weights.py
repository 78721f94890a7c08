"""Folders in and out."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from jaxrl_post import models
from jaxrl_post.errors import InputError
from jaxrl_post.models import weights_in
from jaxrl_post.sharding import make_mesh

GOLDENS = Path(__file__).parents[1] / "goldens" / "models"


@pytest.fixture(scope="module", params=["llama", "llama_tied", "qwen2", "qwen3"])
def model(request):
    return (*models.load(GOLDENS / request.param)[:2], GOLDENS / request.param)


@pytest.fixture(scope="module")
def llama():
    return models.load(GOLDENS / "llama")[:2]


@pytest.fixture
def tokenizer():
    """Eleven tokens, byte-level, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<pad>", *"abcdefgh", "ab"]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert jax.tree.structure(left) == jax.tree.structure(right)


def copy(folder: Path, to: Path, change) -> Path:
    """A folder of one file whose tensors `change` has edited."""
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors")
    return to


@pytest.mark.parametrize("unstacked", [False, True])
def test_save_then_load_is_bitwise(model, tmp_path, unstacked):
    policy, params, folder = model
    given = models.unstack_params(params) if unstacked else params
    path = models.save(policy, given, None, tmp_path / "out")
    again, back, _ = models.load(path)
    assert_same(back, params)
    assert again.config == policy.config
    # the file has the tensors, and only those, that transformers wrote
    ours, theirs = (load_file(f / "model.safetensors") for f in (path, folder))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_several_files_and_their_index(model, tmp_path):
    policy, params, _ = model
    path = models.save(policy, params, None, tmp_path / "out", max_shard_bytes=10_000)
    assert not (path / "model.safetensors").exists()
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == sorted(f.name for f in path.glob("*.safetensors"))
    tensors = {}
    for file in files:
        part = load_file(path / file)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= 10_000
        tensors |= part
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert_same(models.load(path)[1], params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_files(model, tmp_path, dtype):
    """Kept as they are on request, exact in float32 otherwise."""
    policy, params, _ = model
    half = jax.tree.map(lambda x: x.astype(dtype), params)
    path = models.save(policy, half, None, tmp_path / "out")
    assert json.loads((path / "config.json").read_text())["dtype"] == np.dtype(dtype)
    _, back, _ = models.load(path, dtype=dtype)
    assert_same(back, half)
    _, wide, _ = models.load(path)
    assert_same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), half))


def test_each_device_reads_its_part(model, monkeypatch):
    """Same numbers on a mesh, and no read of a whole matrix."""
    from jaxrl_post.models.checkpoints import HuggingFaceFolder

    policy, params, folder = model
    sizes = {}
    read = HuggingFaceFolder.read

    def counted(self, name, index):
        block = read(self, name, index)
        sizes.setdefault(name, []).append(block.size)
        return block

    monkeypatch.setattr(HuggingFaceFolder, "read", counted)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    _, sharded, _ = models.load(folder, mesh)
    assert_same(jax.device_get(sharded), jax.device_get(params))
    kernel = sharded["layers"]["attention"]["q"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor", None)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert sizes[name] == [kernel[0].size // 4] * 4
    # what every device has is read once
    assert sizes["model.norm.weight"] == [policy.config.hidden_size]


@pytest.mark.parametrize("name", ["phi3", "qwen3_moe"])
def test_large_leaves_are_read_a_tensor_at_a_time(name, monkeypatch):
    expected = models.load(GOLDENS / name, dtype=jnp.bfloat16)[1]
    largest = []
    write = weights_in._write

    def noted(leaf, block, at):
        largest.append((block.nbytes, leaf.nbytes))
        return write(leaf, block, at)

    monkeypatch.setattr(weights_in, "_write", noted)
    monkeypatch.setattr(weights_in, "LARGE", 2048)
    found = models.load(GOLDENS / name, dtype=jnp.bfloat16)[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert largest and all(leaf >= 2 * block for block, leaf in largest)


def test_heads_split_otherwise(model):
    _, params, folder = model
    rules = {"heads": None, "kv_heads": None, "head_dim": "tensor"}
    mesh = make_mesh(data=4, tensor=2)
    _, sharded, _ = models.load(folder, mesh, rules)
    assert_same(jax.device_get(sharded), jax.device_get(params))


def test_sharded_parameters_are_saved(llama, tmp_path):
    policy, params = llama
    sharded = models.load(GOLDENS / "llama", make_mesh(data=2, fsdp=2, tensor=2))[1]
    assert_same(
        models.load(models.save(policy, sharded, None, tmp_path / "a"))[1], params
    )


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors["lm_head.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(4, np.float32)
        tensors["model.norm.weight"] = np.zeros(7, np.float32)
        tensors["model.embed_tokens.weight"] = np.zeros((96, 32), np.int32)

    with pytest.raises(InputError) as error:
        models.load(copy(GOLDENS / "llama", tmp_path / "m", change))
    for words in (
        "5 tensor(s)",
        "missing: model.layers.1.mlp.up_proj.weight",
        "missing: lm_head.weight",
        "unexpected: model.layers.0.self_attn.q_proj.bias",
        "mis-shaped: model.norm.weight is (7,), the config asks for (32,)",
        "dtype I32 of model.embed_tokens.weight",
    ):
        assert words in str(error.value)


def test_tied_head_in_the_file(tmp_path):
    def with_head(scale):
        def change(tensors):
            tensors["lm_head.weight"] = scale * tensors["model.embed_tokens.weight"]
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(
                4, np.float32
            )

        return change

    source = GOLDENS / "llama_tied"
    same = copy(source, tmp_path / "same", with_head(1.0))
    assert_same(models.load(same)[1], models.load(source)[1])
    with pytest.raises(InputError, match="lm_head.weight, which differs"):
        models.load(copy(source, tmp_path / "other", with_head(2.0)))


def test_tokenizer_vocabulary_and_stop_tokens(llama, tokenizer, tmp_path):
    policy, params = llama
    config = dataclasses.replace(policy.config, stop_token_ids=(4, 7))
    policy = models.decoder(config)
    assert models.stop_token_ids(policy) == (4, 7)
    path = models.save(policy, params, tokenizer, tmp_path / "out")
    generation = json.loads((path / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [0, 4, 7], "pad_token_id": 1}
    again, back, loaded = models.load(path)
    assert_same(back, params)
    # rows beyond the tokenizer's eleven are padding
    assert (again.vocab_size, again.config.padded_vocab_size) == (11, 96)
    assert again.unembedding(back).shape[0] == 96
    assert models.stop_token_ids(again, loaded) == (0, 4, 7)
    assert loaded("abba")["input_ids"] == tokenizer("abba")["input_ids"] == [10, 3, 2]
    chat = loaded.apply_chat_template(
        [{"role": "user", "content": "ab"}], tokenize=False
    )
    assert chat == "ab"


def test_tokenizer_larger_than_the_embedding(llama, tokenizer, tmp_path):
    policy, params = llama
    tokenizer.add_tokens([f"<{i}>" for i in range(90)])
    path = models.save(policy, params, tokenizer, tmp_path / "out")
    with pytest.raises(InputError, match="101 tokens, the embedding only 96 rows"):
        models.load(path)


def test_nothing_is_overwritten_unasked(llama, tmp_path):
    policy, params = llama
    path = tmp_path / "out"
    path.mkdir()
    models.save(policy, params, None, path)  # an empty folder is fine
    with pytest.raises(InputError, match="exists; choose another path, or replace it"):
        models.save(policy, params, None, path)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    models.save(policy, doubled, None, path, overwrite=True)
    assert_same(models.load(path)[1], doubled)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("dear")
    with pytest.raises(InputError, match="has no config.json; it is not overwritten"):
        models.save(policy, params, None, tmp_path / "notes", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "out"]


def test_a_failed_save_leaves_nothing(llama, tmp_path, monkeypatch):
    policy, params = llama
    monkeypatch.setattr("safetensors.numpy.save_file", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.save(policy, params, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_model(llama, tmp_path):
    policy, params = llama
    params = {**params, "extra": params["embed"], "embed": params["embed"][:5]}
    del params["unembed"]
    with pytest.raises(InputError) as error:
        models.save(policy, params, None, tmp_path / "out")
    for words in (
        "missing: unembed",
        "unexpected: extra",
        "mis-shaped: embed is (5, 32)",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no/such/folder", "no hub id"),
        ("nowhere.gguf", "no such file. scripts/get_smollm2.py"),
        ("science_bass", "none of the embedded models .science_base."),
        ("owner/name", "fetching it from the Hugging Face hub failed"),
    ],
)
def test_no_such_model(name, words):
    with pytest.raises(InputError, match=words):
        models.load(name)


def test_broken_folders(tmp_path):
    with pytest.raises(InputError, match="is no model"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        models.load(tmp_path)
    source = GOLDENS / "llama"
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(InputError, match="read from safetensors only"):
        models.load(tmp_path)
    weights = (source / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        models.load(tmp_path)


def test_a_tokenizer_comes_without_advice_to_install_torch():
    code = "from jaxrl_post.models.checkpoints import open_checkpoint as f; "
    code += "assert f('science_base').tokenizer()"
    quiet = {k: v for k, v in os.environ.items() if "TRANSFORMERS_" not in k}
    result = subprocess.run(
        [sys.executable, "-c", code], env=quiet, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
