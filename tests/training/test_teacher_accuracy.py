"""The teacher's own answers: which context is asked, what is averaged."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from tiny_policy import PARAMS

from jaxrl_post import recipes
from jaxrl_post.generation import Rollouts
from jaxrl_post.models import load
from jaxrl_post.recipes import Reprompt
from jaxrl_post.training.state import init_state
from jaxrl_post.training.teacher_accuracy import teacher_accuracy, teacher_params
from jaxrl_post.training.teacher_contexts import make_teacher_contexts
from jaxrl_post.types import Verdict


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load(tiny_model)[2]


class Parrot:
    """A sampler whose first answer to a context is "y", and whose others are "n";
    of every question but the first, all are "y"."""

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    max_new_tokens = 1

    def generate(self, params, contexts, mask, *, group_size, **options):
        answers = []
        for row, keep in zip(contexts, mask, strict=True):
            self.asked.append(self.tokenizer.decode(row[keep]))
            first = "q0" in self.asked[-1]
            answers += ["y"] + ["n" if first else "y"] * (group_size - 1)
        tokens = [self.tokenizer(text)["input_ids"] for text in answers]
        whole = np.ones((len(tokens), 1))
        return Rollouts(np.array(tokens), whole, whole, whole, whole[:, 0] > 0)


POOL = SimpleNamespace(judge=lambda judge, prompts, texts: judge(prompts, texts))
TASK = SimpleNamespace(
    judge=lambda prompts, texts: [Verdict(float(t == "y"), t == "y") for t in texts]
)


def ask(groups, tokenizer):
    contexts = make_teacher_contexts(
        groups, Reprompt(), tokenizer, np.random.default_rng(0)
    )
    parrot, key = Parrot(tokenizer), jax.random.key(0)
    found = teacher_accuracy(
        None, groups, contexts, parrot, tokenizer, TASK, POOL, samples=4, key=key
    )
    return found, parrot.asked


def test_of_each_question_the_commonest_context(tokenizer, make_groups):
    groups = make_groups([[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
    found, asked = ask(groups, tokenizer)
    # Right once of four, and always; the student of 2/4 and 1/4. The second question
    # has no context; the third row only keeps the shape.
    assert found == {
        "teacher/accuracy": (0.25 + 1.0) / 2,
        "teacher/student_accuracy": (0.5 + 0.25) / 2,
        "teacher/questions": 2.0,
    }
    assert [text[:2] for text in asked] == ["q0", "q2", "q2"]
    assert "worked solution:\n1" in asked[0]  # what three of four see; one sees "2"


def test_no_question_is_no_metric(tokenizer, make_groups):
    assert ask(make_groups([[0, 0], [0, 0]]), tokenizer) == ({}, [])


@pytest.mark.parametrize("kind", ["live", "ema", "frozen", "trust_region"])
def test_whose_parameters(kind):
    recipe = recipes.sdpo(teacher=kind)
    state = init_state(PARAMS, optax.sgd(1.0), recipe, jax.random.key(0))
    found = teacher_params(recipe, state)
    if kind == "trust_region":  # a mixture of two models' logits cannot be sampled
        assert found is None
    else:
        wanted = state.trainable if kind == "live" else state.teacher
        assert found["embed"] is wanted["embed"]
