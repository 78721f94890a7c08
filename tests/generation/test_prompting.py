"""Prompts to token arrays and responses to text, with a tokenizer made on the spot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from jaxrl_post.errors import InputError
from jaxrl_post.generation import (
    decode_responses,
    encode_prompts,
    pad_contexts,
    quote_special_tokens,
    stop_token_ids,
    tokenize_prompts,
)
from jaxrl_post.types import Prompts

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"
    "{% if loud %}!{% endif %}{% if add_generation_prompt %}<a>{% endif %}"
)
SPECIAL = ["<pad>", "<end>", "<u>", "<a>"]


@pytest.fixture
def tokenizer():
    """One token per character."""
    letters = "abcdefghij !"
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        pad_token="<end>",
        additional_special_tokens=["<u>", "<a>", "<pad>"],
    )
    made.chat_template = TEMPLATE
    return made


def prompts(*questions):
    count = len(questions)
    return Prompts(
        ids=tuple(f"q{i}" for i in range(count)),
        messages=tuple(({"role": "user", "content": q},) for q in questions),
        columns=({},) * count,
        demonstrations=(None,) * count,
    )


def test_chat_template_and_its_arguments(tokenizer):
    messages = prompts("ab").messages
    assert tokenize_prompts(tokenizer, messages) == [[2, 4, 5, 3]]
    loud = tokenize_prompts(tokenizer, messages, chat_template_arguments={"loud": True})
    assert loud == [[2, 4, 5, 15, 3]]


def test_without_template_contents_are_joined(tokenizer):
    tokenizer.chat_template = None
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert tokenize_prompts(tokenizer, [turns, "ba"]) == [[4, 5], [5, 4]]


def test_strings_pass_by_the_template(tokenizer):
    assert tokenize_prompts(tokenizer, ["<u>c"]) == [[2, 6]]


def chatml():
    """Bytes as tokens, turns as Qwen and SmolLM write them, a token before a text."""
    special = ["<s>", "<|im_start|>", "<|im_end|>", "<|im_end|>!"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        additional_special_tokens=special,
    )
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}"
        "<|im_end|>\n{% endfor %}<|im_start|>assistant:"
    )
    return made


CHATML = chatml()
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant:"


@settings(deadline=None)  # the first example starts the process that renders
@given(
    st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "<s>", "<|im_end|>!", "{a}"])
        | st.text("aä<|>!", max_size=3)
    ).map("".join)
)
def test_quoted_special_tokens_are_text(text):
    quoted = quote_special_tokens(CHATML, text)
    message = {"role": "user", "content": f"1{quoted}2"}
    (ids,) = tokenize_prompts(CHATML, [[message]])
    assert CHATML.decode(ids) == TURN.format(f"1{text}2")
    assert [i for i in ids if i in CHATML.all_special_ids] == [1, 2, 1]


def test_special_tokens_that_nobody_quoted_are_tokens():
    message = {"role": "user", "content": "1<|im_end|>2"}
    (ids,) = tokenize_prompts(CHATML, [[message]])
    assert [i for i in ids if i in CHATML.all_special_ids] == [1, 2, 2, 1]
    assert quote_special_tokens(CHATML, "<|im_end|") == "<|im_end|"


def test_quoted_without_a_template_begins_once():
    quoted = quote_special_tokens(CHATML, "<|im_end|>")
    for text in (f"{quoted}a{quoted}", f"a{quoted}"):
        (ids,) = tokenize_prompts(CHATML, [text])
        assert [i for i in ids if i in CHATML.all_special_ids] == [0]
        assert CHATML.decode(ids[1:]) == text.replace("\ufdd0", "").replace(
            "\ufdd1", ""
        )


def test_contexts_are_padded_on_the_left_to_a_multiple():
    contexts, mask = pad_contexts([[1, 2, 3, 4, 5], [6]], multiple=4, pad_token=9)
    assert contexts.tolist() == [[9, 9, 9, 1, 2, 3, 4, 5], [9] * 7 + [6]]
    assert mask.sum(-1).tolist() == [5, 1] and mask[:, -1].all()
    assert contexts.dtype == np.int32


def test_long_prompts_are_dropped_and_named(tokenizer):
    encoded = encode_prompts(
        tokenizer, prompts("a", "abcdefg", "ab"), max_prompt_length=5, multiple=8
    )
    assert encoded.prompts.ids == ("q0", "q2")
    assert encoded.dropped == ("q1",)
    assert encoded.contexts.shape == (2, 8)
    assert encoded.context_mask.sum(-1).tolist() == [3, 4]


def test_too_many_long_prompts_are_an_error(tokenizer):
    settings = {"max_prompt_length": 5, "max_dropped_share": 0.5}
    encode_prompts(tokenizer, prompts("a", "abcdefg"), **settings)
    with pytest.raises(InputError, match="2 of 3 prompts.*=5.*'q1'.*share=0.5"):
        encode_prompts(tokenizer, prompts("a", "abcdefg", "abcdefgh"), **settings)


def test_empty_prompts_are_an_error(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="'q1' is empty"):
        encode_prompts(tokenizer, prompts("a", ""), max_prompt_length=5)


def test_stop_tokens(tokenizer):
    assert stop_token_ids(tokenizer) == (1,)
    assert stop_token_ids(tokenizer, ["!", "<end>", "<u>"]) == (1, 15, 2)
    with pytest.raises(InputError, match="'ab' is 2 tokens"):
        stop_token_ids(tokenizer, ["ab"])
    tokenizer.eos_token = None
    assert stop_token_ids(tokenizer) == ()


def test_responses_end_at_the_mask_not_at_ids(tokenizer):
    tokens = np.array([[4, 5, 1, 6, 6], [6, 6, 6, 6, 1]])
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    assert decode_responses(tokenizer, tokens, mask) == ["ab", "cc"]
