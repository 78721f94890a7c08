"""A model of a few thousand parameters with a tokenizer, and configs for it."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder that `models.load` opens: bytes as tokens, random weights."""
    import jax
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from jaxrl_post.models import DecoderConfig, decoder, save

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<end>", *alphabet]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    config = DecoderConfig(
        vocab_size=len(tokens),
        padded_vocab_size=264,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        tie_embeddings=True,
        max_positions=256,
    )
    policy = decoder(config)
    path = tmp_path_factory.mktemp("models") / "tiny"
    save(policy, policy.init(jax.random.key(0)), fast, path)
    return path


@pytest.fixture
def tiny_config(tiny_model, tmp_path):
    """Makes a checked config; keyword arguments are sections that update it."""
    from jaxrl_post.training import Config

    def make(**sections):
        tree = {
            "run": {"dir": str(tmp_path / "run"), "judge_workers": 1},
            "model": {"path": str(tiny_model)},
            "task": {"name": "tiny_task:load", "max_prompt_length": 16},
            "recipe": {"name": "grpo"},
            "optimizer": {"learning_rate": 1e-2},
            "training": {"steps": 4, "prompts_per_step": 4, "group_size": 4},
            "sampling": {"max_new_tokens": 6},
            "mesh": {"data": 1},
            "evaluation": {"held": {"rows": 4, "samples": 2, "split": "test"}},
        }
        for section, keys in sections.items():
            tree[section] = {**tree.get(section, {}), **keys} if keys else keys
        return Config.from_dict(tree)

    return make


@pytest.fixture
def make_groups():
    """Makes judged groups; completion ``g`` of each is the text ``"g"``."""
    from tiny_groups import make_groups

    return make_groups


@pytest.fixture
def orbax_fails(caplog):
    """For tests in which Orbax fails: what it leaves unawaited complains when it is
    collected, which is here, not in a test that comes later."""
    yield
    caplog.get_records("call").clear()  # they hold the errors, these what they met
    gc.collect()
