"""The embedded base model: its tokenizer, its figures, and that it still has them."""

from __future__ import annotations

import hashlib
import itertools
import json
from random import Random

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_post import models
from jaxrl_post.generation import Sampler, pad_contexts, tokenize_prompts
from jaxrl_post.models.checkpoints import EMBEDDED
from jaxrl_post.tasks import science
from jaxrl_post.tasks.reprompt import reprompt_messages

FOLDER = EMBEDDED["science_base"]


@pytest.fixture(scope="module")
def base():
    return models.load("science_base")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def figures():
    return json.loads((FOLDER / "figures.json").read_text())


def ids(tokenizer, *messages):
    return tokenize_prompts(tokenizer, [messages])[0]


def test_any_text_survives_the_tokenizer(tokenizer):
    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def survives(text):
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(encoded) == text

    survives()
    assert not tokenizer("a b", add_special_tokens=True)["input_ids"][0] < 5


def test_digits_and_bases_are_single_tokens(tokenizer):
    for text in ("1234567890", "ACGUT", "(x+3)*2", "=/-<>"):
        assert len(tokenizer(text)["input_ids"]) == len(text)
    assert len(tokenizer("Na2Mg")["input_ids"]) == 3


def test_the_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "7*6?"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "why?"},
    ]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert (
        text == "<|system|>s<|user|>7*6?<|assistant|>42<|end|><|user|>why?<|assistant|>"
    )
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")


def test_lengths_stay_within_the_budgets(tokenizer):
    rng = Random(0)
    longest = {"prompt": 0, "response": 0, "reprompt": 0}
    for domain, level in itertools.product(science.DOMAINS, science.LEVELS):
        for _ in range(40):
            question = science.draw(rng, "train", domain, level)
            row = science.row(question, "q")
            wrong = max(question.misconceptions, key=len)
            feedback = science.judge_one(row.columns, wrong).feedback
            told = reprompt_messages(
                row.messages, demonstration=question.solution, feedback=feedback
            )
            lengths = {
                "prompt": len(ids(tokenizer, *row.messages)),
                "response": len(tokenizer(question.solution)["input_ids"]) + 1,
                "reprompt": len(ids(tokenizer, *told)),
            }
            longest = {k: max(longest[k], v) for k, v in lengths.items()}
    assert longest["prompt"] <= 36
    assert longest["response"] <= 29
    assert longest["reprompt"] <= 100


def test_the_shape_divides(base):
    policy, params, tokenizer = base
    config = policy.config
    assert config.hidden_size % 4 == config.intermediate_size % 4 == 0
    assert config.num_heads % 4 == config.num_kv_heads % 4 == 0
    assert config.rows % 8 == 0 and len(tokenizer) <= config.rows
    assert 0.8e6 < sum(x.size for x in jax.tree.leaves(params)) < 1.2e6


def test_the_figures_are_of_these_weights(figures):
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert figures["sha256"] == hashlib.sha256(weights).hexdigest()


def test_the_figures_are_those_of_a_laboratory(figures):
    levels = figures["levels"]
    for level, figure in levels.items():
        assert figure["parsed"] >= 0.95, level
        assert figure["with_demonstration"] >= 0.9, level
    assert 0.2 <= levels["1"]["t1"] <= 0.4
    for level in ("3", "4"):
        assert 0.01 <= levels[level]["t1"] <= 0.05
        assert levels[level]["pass@64"] >= 0.4
    assert levels["5"]["pass@64"] < 0.03
    assert figures["greedy_fails_below_half"] >= 0.6
    for level in ("1", "2", "3", "4"):
        figure = levels[level]
        assert figure["with_feedback"] >= figure["without_feedback"] + 0.15


def test_the_model_still_has_them(base):
    policy, params, tokenizer = base
    task = science.load("test", size=5)
    prompts = task.rows(range(len(task)))
    sampler = Sampler(
        policy, max_new_tokens=32, stop_tokens=(tokenizer.eos_token_id,), slots=200
    )

    def mean_reward(conversations, group_size):
        contexts = pad_contexts(tokenize_prompts(tokenizer, conversations), 100)
        rollouts = sampler.generate(
            params, *contexts, key=jax.random.key(0), group_size=group_size
        )
        answers = tokenizer.batch_decode(rollouts.tokens, skip_special_tokens=True)
        index = [i for i in range(len(task)) for _ in range(group_size)]
        verdicts = task.judge(prompts.take(index), answers)
        parsed = sum(v.extra["parsed"] for v in verdicts) / len(verdicts)
        return sum(v.reward for v in verdicts) / len(verdicts), parsed

    plain, parsed = mean_reward(prompts.messages, 4)
    assert 0.08 < plain < 0.45 and parsed > 0.9
    shown = [
        reprompt_messages(messages, demonstration=demonstration)
        for messages, demonstration in zip(
            prompts.messages, prompts.demonstrations, strict=True
        )
    ]
    assert mean_reward(shown, 4)[0] > 0.85
