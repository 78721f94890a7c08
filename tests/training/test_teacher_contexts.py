"""Teacher contexts as tokens: distinct ones once, questions never cut."""

from __future__ import annotations

import numpy as np
import pytest

from jaxrl_post.models import load
from jaxrl_post.recipes import Privileged, Reprompt
from jaxrl_post.tasks.reprompt import reprompt_text
from jaxrl_post.training.teacher_contexts import fit_context, make_teacher_contexts


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load(tiny_model)[2]


MESSAGES = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "7?"},
)


def test_short_contexts_are_whole(tokenizer):
    ids, cut = fit_context(tokenizer, MESSAGES, Privileged("{a} 49", "no"), Reprompt())
    text = reprompt_text("7?", demonstration="{a} 49", feedback="no")
    assert not cut
    assert tokenizer.decode(ids) == f"be brief\n{text}\n"


@pytest.mark.parametrize("limit", [60, 75, 90])
def test_long_texts_are_cut_and_questions_are_not(tokenizer, limit):
    privileged = Privileged("d" * 80, "f" * 40)
    ids, cut = fit_context(tokenizer, MESSAGES, privileged, Reprompt(max_length=limit))
    text = tokenizer.decode(ids)
    assert cut and len(ids) <= limit
    assert text.startswith("be brief\n7?") and text.endswith("solve it:\n")
    # The cut keeps the proportion, as far as whole tokens allow.
    if text.count("f") > 8:
        assert abs(text.count("d" * 3) / text.count("f" * 3) - 2) < 1


def test_inserted_text_is_inert(tokenizer):
    """Braces, and names of special tokens, which would end a turn."""
    shown = Privileged("{prompt}49<end>", "<pad>{0}")
    ids, _ = fit_context(tokenizer, MESSAGES, shown, Reprompt())
    text = reprompt_text("7?", demonstration="{prompt}49<end>", feedback="<pad>{0}")
    assert tokenizer.decode(ids) == f"be brief\n{text}\n"
    assert not set(ids) & set(tokenizer.all_special_ids)
    # A name is as long as its text: as much of it is kept as there is room for.
    whole = len(
        fit_context(tokenizer, MESSAGES, Privileged("<end>" * 9), Reprompt())[0]
    )
    ids, cut = fit_context(
        tokenizer, MESSAGES, Privileged("<end>" * 9), Reprompt(max_length=whole - 20)
    )
    assert cut and whole - 25 <= len(ids) <= whole - 20
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_question_too_long_by_itself_stays(tokenizer):
    ids, cut = fit_context(
        tokenizer, MESSAGES, Privileged("d" * 80), Reprompt(max_length=5)
    )
    assert cut and tokenizer.decode(ids).startswith("be brief\n7?")


def test_distinct_contexts_once(tokenizer, make_groups):
    groups = make_groups([[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
    teacher = make_teacher_contexts(
        groups, Reprompt(max_length=64), tokenizer, np.random.default_rng(0)
    )
    # group 0: siblings see "1", sample 1 sees "2"; group 1: nothing; group 2: "1".
    assert teacher.metrics["teacher/contexts"] == 3
    assert teacher.contexts.shape[0] == 4
    np.testing.assert_array_equal(
        teacher.distilled,
        [[True] * 4, [False] * 4, [True, False, True, True]],
    )
    rows = teacher.index[0]
    assert rows[0] == rows[2] == rows[3] != rows[1]
    assert len({*teacher.index[2][[0, 2, 3]]}) == 1
    for p, g, wanted in [(0, 0, "1"), (0, 1, "2"), (2, 3, "1")]:
        row = teacher.index[p, g]
        text = tokenizer.decode(teacher.contexts[row][teacher.context_mask[row]])
        assert reprompt_text(f"q{p}", demonstration=wanted) in text


def test_nothing_to_teach_keeps_the_form(tokenizer, make_groups):
    groups = make_groups([[0, 0], [0, 0]])
    teacher = make_teacher_contexts(
        groups, Reprompt(), tokenizer, np.random.default_rng(0)
    )
    assert teacher.contexts.shape[0] == 1 and teacher.context_mask.any()
    assert not teacher.distilled.any()
    assert teacher.metrics["teacher/reprompted"] == 0
