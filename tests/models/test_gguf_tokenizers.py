"""Tokenizers of GGUF files beside those that transformers makes of the same tokens.

The vocabulary is trained on the docs without any splitting, so that its tokens reach
over spaces, digits and line ends: where two split a text otherwise, ids differ.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from jaxrl_post import models
from jaxrl_post.models.gguf import GGUFFile

DOCS = Path(__file__).parents[2] / "docs"
END, THINK = "<|endoftext|>", "<think>"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}"
TEXTS = [
    "It's 1234567 o'clock, WE'LL see; don't",
    "  two  spaces\t\ttabs \n\n\n  and lines\r\n\r\nof  both kinds \n",
    "caf\u00e9 cafe\u0301 na\u00efve \u1e69 \u0073\u0323\u0307",  # composed or not
    "\u0661\u0662\u0663 \u00bd \u2167 \u4e09\u5341 12.5e-3 0x1F",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u041f\u0440\u0438\u0432\u0435\u0442!",
    "\U0001f469\u200d\U0001f52c \U0001f1e9\U0001f1ea #@!?...---=== \u00a0\u2003x",
    f"a{THINK}b{END}c {THINK} \n{END}",
    "def f(x):\n    return {'a': [x**2, \"b\"]}  # 3 + 4\n",
    "",
    " ",
]


@pytest.fixture(scope="module")
def vocabulary():
    """Tokens in the order of their ids, and merges, best first."""
    trained = Tokenizer(tokenizer_models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    lines = [x for p in sorted(DOCS.glob("*.md")) for x in p.read_text().splitlines()]
    every = [f"{a}\n{b}" for a, b in zip(lines[::8], lines[1::8], strict=False)]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator([*every, *TEXTS, *map(str, range(300))], trainer)
    parts = json.loads(trained.to_str())["model"]
    tokens = sorted(parts["vocab"], key=parts["vocab"].get)
    return [*tokens, END, THINK], [tuple(pair) for pair in parts["merges"]]


def theirs(kind, tokens, merges):
    """The family's tokenizer, by transformers' own classes where it has one."""
    vocab = {token: i for i, token in enumerate(tokens)}
    if kind in ("qwen2", "gpt-2"):
        family = Qwen2Tokenizer if kind == "qwen2" else GPT2Tokenizer
        made = family(vocab=vocab, merges=merges, pad_token=END)
    else:
        whole = Tokenizer(tokenizer_models.BPE(vocab, merges))
        if kind == "llama-bpe":

            class Converter(TikTokenConverter):
                def tokenizer(self):
                    whole.model.ignore_merges = True
                    return whole

            whole = Converter(extra_special_tokens=[END]).converted()
        else:  # as SmolLM2's tokenizer.json has it
            steps = [{"type": "Digits", "individual_digits": True}, BYTES]
            tree = json.loads(whole.to_str())
            tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
            whole = Tokenizer.from_str(json.dumps(tree))
            whole.decoder = decoders.ByteLevel()
        made = PreTrainedTokenizerFast(
            tokenizer_object=whole, bos_token=END, eos_token=END, pad_token=END
        )
    made.add_tokens([THINK])
    made.chat_template = TEMPLATE
    return made


BYTES = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
KINDS = ["gpt-2", "smollm", "qwen2", "llama-bpe"]


def ours(kind, tokens, merges, path):
    """What is read from a file with these tokens."""
    writer = gguf.GGUFWriter(path, "qwen2")
    for key in ("block_count", "feed_forward_length", "head_count", "head_count_kv"):
        getattr(writer, f"add_{key}")(1)
    writer.add_embedding_length(8)
    writer.add_context_length(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    kinds = {END: gguf.TokenType.CONTROL, THINK: gguf.TokenType.USER_DEFINED}
    writer.add_token_types([kinds.get(t, gguf.TokenType.NORMAL) for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(tokens.index(END))
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path).tokenizer()


@pytest.fixture(scope="module")
def pairs(vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return {
        kind: (
            ours(kind, *vocabulary, folder / f"{kind}.gguf"),
            theirs(kind, *vocabulary),
        )
        for kind in KINDS
    }


def assert_same(pair, texts):
    made, expected = (tokenizer(texts)["input_ids"] for tokenizer in pair)
    for text, a, b in zip(texts, made, expected, strict=True):
        assert a == b, text
    assert pair[0].batch_decode(made) == pair[1].batch_decode(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_the_docs_and_of_odd_texts(kind, pairs):
    built, expected = pairs[kind]
    assert built.get_vocab() == expected.get_vocab()
    pages = [path.read_text() for path in sorted(DOCS.glob("*.md"))]
    assert_same(pairs[kind], [*TEXTS, *pages])
    assert built.eos_token_id == expected.eos_token_id == built.pad_token_id
    chat = [{"role": "user", "content": "What is 17 + 25?"}]
    options = {"tokenize": True, "return_dict": False}
    assert built.apply_chat_template(chat, **options) == (
        expected.apply_chat_template(chat, **options)
    )


def test_each_kind_splits_otherwise(pairs):
    """What the comparison would see, were one kind taken for another."""
    found = {kind: pairs[kind][0](TEXTS)["input_ids"] for kind in KINDS}
    for i, kind in enumerate(KINDS):
        for other in KINDS[i + 1 :]:
            assert found[kind] != found[other]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_reference_data(kind, pairs, shared):
    rows = [
        json.loads(line)
        for path in sorted((shared / "data").glob("**/test.jsonl"))
        for line in path.read_text().splitlines()[:60]
    ]
    texts = [x for row in rows for x in row.values() if isinstance(x, str)]
    assert len(texts) > 300
    assert_same(pairs[kind], texts)


def test_the_vocabulary_of_the_embedded_model(tmp_path):
    """Its tokens and merges as a file's; the file cannot name its own splitting."""
    _, _, tokenizer = models.load("science_base")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(parts["vocab"], key=parts["vocab"].get)
    whole = [*tokens[5:], END, THINK]  # the first are its own special tokens
    merges = [tuple(pair) for pair in parts["merges"]]
    built = ours("qwen2", whole, merges, tmp_path / "m.gguf")
    assert_same((built, theirs("qwen2", whole, merges)), TEXTS)
    for word in ("hydrogen", " what", " question"):  # which all split off
        ids = tokenizer(word)["input_ids"]
        assert [i - 5 for i in ids] == built(word)["input_ids"]
