"""Asking a model: prompts given, piped and typed."""

from __future__ import annotations

import io
import re
import sys
import types

import jax
import pytest

from jaxrl_post import cli, models
from jaxrl_post.cli import sample
from jaxrl_post.errors import InputError


class Typed(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def asked(monkeypatch):
    """Answers without a model; returns what was asked."""
    questions = []

    def load(arguments):
        def ask(question):
            questions.append(question)
            if question == "too long":
                raise InputError("the question is too long")
            return [f"{question}!" for _ in range(arguments.n)]

        return ask

    monkeypatch.setattr(sample, "load", load)
    return questions


def test_one_prompt(asked, capsys):
    assert cli.main(["sample", "m", "--prompt", "Why?"]) == 0
    assert asked == ["Why?"] and capsys.readouterr().out == "Why?!\n"


def test_several_answers_are_numbered(asked, capsys):
    assert cli.main(["sample", "m", "--prompt", "Why?", "-n", "2"]) == 0
    assert capsys.readouterr().out == "[1] Why?!\n[2] Why?!\n"


def test_piped_lines_are_questions(asked, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    assert cli.main(["sample", "m"]) == 0
    assert capsys.readouterr() == ("one!\ntwo!\n", "")


def test_a_piped_question_that_fails_fails_the_command(asked, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("too long\ntwo\n"))
    assert cli.main(["sample", "m"]) == 2
    assert capsys.readouterr() == ("", "error: the question is too long\n")


def test_typed_questions_go_on_after_a_bad_one_until_ctrl_d(asked, capsys, monkeypatch):
    lines = iter(["too long", "", "two"])
    monkeypatch.setattr(sys, "stdin", Typed())
    monkeypatch.setattr("builtins.input", lambda prompt: next_line(lines))
    assert cli.main(["sample", "m"]) == 0
    output = capsys.readouterr()
    assert output.out == "two!\n\n"
    assert "error: the question is too long" in output.err
    assert asked == ["too long", "two"]


def test_ctrl_c_at_the_prompt(asked, capsys, monkeypatch):
    def input_(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Typed())
    monkeypatch.setattr("builtins.input", input_)
    assert cli.main(["sample", "m"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def next_line(lines):
    for line in lines:
        return line
    raise EOFError


class Letters:
    """A tokenizer of a character per token, without a chat template."""

    chat_template = None
    eos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) % 64 for letter in text]}

    def batch_decode(self, rows, **options):
        return ["".join(chr(token + 64) for token in row) for row in rows]


@pytest.fixture(scope="module")
def random_model():
    config = models.DecoderConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_positions=96,
    )
    policy = models.decoder(config)
    return policy, policy.init(jax.random.key(0))


@pytest.fixture
def tiny_model(random_model, monkeypatch):
    """A random model in place of the one that is loaded; returns what was opened."""
    opened = []

    def load(path):
        opened.append(path)
        return *random_model, Letters() if path != "mute" else None

    monkeypatch.setattr(models, "load", load, raising=False)
    checkpoints = types.SimpleNamespace(load_policy=load)
    monkeypatch.setitem(sys.modules, "jaxrl_post.training.checkpoints", checkpoints)
    return opened


def answers(capsys, *options):
    command = ["sample", "m", "--prompt", "Why?", "--max-new-tokens", "8"]
    assert cli.main([*command, *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_model_is_asked(tiny_model, capsys):
    greedy = answers(capsys)
    assert len(greedy) == 1 and 0 < len(greedy[0]) <= 8
    assert answers(capsys, "--system", "Be brief.", "--seed", "1") != greedy
    sampled = answers(capsys, "-n", "3", "--seed", "1")
    assert len(set(sampled)) == 3
    assert answers(capsys, "-n", "3", "--seed", "2") != sampled
    assert tiny_model == ["m"] * 4


def test_a_run_is_asked_by_its_checkpoint(tiny_model, capsys, tmp_path):
    (tmp_path / "config.yaml").touch()
    options = ["--prompt", "Why?", "--max-new-tokens", "8"]
    assert cli.main(["sample", str(tmp_path), *options]) == 0
    assert tiny_model == [str(tmp_path)]


@pytest.mark.parametrize(
    "argv, error",
    [
        (["m", "--prompt", "long" * 30], "positions"),
        (["m", "--prompt", ""], "empty|no token"),
        (["mute", "--prompt", "Why?"], "mute: the model has no tokenizer"),
    ],
)
def test_what_cannot_be_asked_is_one_error(tiny_model, capsys, argv, error):
    assert cli.main(["sample", *argv, "--max-new-tokens", "8"]) == 2
    assert re.match(f"error: .*({error})", capsys.readouterr().err)
