"""The science task: its questions, splits, judge and interpreter."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_post.tasks import science
from jaxrl_post.tasks.science import (
    DOMAINS,
    LEVELS,
    SPLITS,
    biology,
    draw,
    final_answer,
    judge_one,
    row,
)
from jaxrl_post.tasks.science.language import (
    MAX_DEPTH,
    MAX_LENGTH,
    MAX_MAGNITUDE,
    ProgramError,
    compile_program,
)

CELLS = list(itertools.product(DOMAINS, LEVELS))


def questions(domain, level, count=150, split="train"):
    rng = Random(f"test {domain} {level}")
    return [draw(rng, split, domain, level) for _ in range(count)]


def verdict(question, completion):
    return judge_one(row(question, "q").columns, completion)


@pytest.mark.parametrize(("domain", "level"), CELLS)
def test_solutions_are_right_and_misconceptions_wrong(domain, level):
    for question in questions(domain, level):
        right = verdict(question, question.solution)
        assert (right.reward, right.success, right.feedback) == (1.0, True, None)
        assert right.extra == {
            "domain": domain,
            "level": level,
            "parsed": True,
            "answer": question.answer,
        }
        assert question.misconceptions
        for wrong in map(lambda m: verdict(question, m), question.misconceptions):
            assert (wrong.reward, wrong.success) == (0.0, False)
            assert wrong.extra["parsed"]
            assert question.method in wrong.feedback
            assert question.solution not in wrong.feedback


def numbers_in(text):
    words = text.replace("?", " ").replace(".", " ").replace(",", " ").split()
    return [int(word) for word in words if word.isdigit()]


RULES = {
    "force": lambda n: n[0] * n[1],
    "distance": lambda n: n[0] * n[1],
    "work": lambda n: n[0] * n[1],
    "large force": lambda n: n[0] * n[1],
    "momentum": lambda n: n[0] * (n[2] - n[1]),
    "speed": lambda n: n[0] + n[1] * n[2],
    "density": lambda n: n[1] // n[0],
    "mass": lambda n: n[0] * n[1],
    "plate": lambda n: n[0] * n[1] * n[3],
    "wire": lambda n: n[0] * n[1],
    "composition": lambda n: 50 - n[0],
    "coding length": lambda n: 3 * n[0],
}


def test_answers_follow_from_the_text():
    seen = set()
    for domain, level in CELLS:
        for question in questions(domain, level):
            rule = RULES.get(question.kind)
            if rule:
                seen.add(question.kind)
                assert int(question.answer) == rule(numbers_in(question.text)), question
    assert seen == set(RULES)


ATOMIC_MASS = {"H": 1, "C": 12, "N": 14, "O": 16, "F": 19, "Na": 23, "Mg": 24, "S": 32}


def weigh(formula, mass):
    """Sum over a formula by repeated expansion; independent of the generator."""
    import re

    while match := re.search(r"\(([^()]*)\)(\d*)", formula):
        inside = match[1] * int(match[2] or 1)
        formula = formula[: match.start()] + inside + formula[match.end() :]
    parts = re.findall(r"([A-Z][a-z]?)(\d*)", formula)
    return sum(mass.get(element, 0) * int(n or 1) for element, n in parts)


def test_chemistry_by_an_independent_parser():
    one = dict.fromkeys(ATOMIC_MASS, 1)
    for level in LEVELS:
        for question in questions("chemistry", level):
            formula = question.text.rstrip("?").split()[-1]
            if question.kind in ("atoms", "groups"):
                expected = weigh(formula, one)
            elif question.kind == "all atoms":
                expected = weigh(formula, one) * numbers_in(question.text)[0]
            elif question.kind == "molecules":
                element = question.text.split()[2]
                expected = weigh(formula, {element: 1}) * numbers_in(question.text)[0]
            elif question.kind == "moles":
                expected = weigh(formula, ATOMIC_MASS) * numbers_in(question.text)[0]
            else:
                expected = weigh(formula, ATOMIC_MASS)
            assert int(question.answer) == expected, question


def test_biology_facts():
    assert biology.CODE["AUG"] == "M" and biology.CODE["UGG"] == "W"
    assert [c for c, a in biology.CODE.items() if a == "*"] == ["UAA", "UAG", "UGA"]
    pairs = dict(zip("ACGT", "UGCA", strict=True))
    for level in (1, 2, 3, 4):
        for question in questions("biology", level):
            if question.kind in ("transcription", "reverse"):
                strand = question.text.split()[3]
                strand = strand[::-1] if question.kind == "reverse" else strand
                assert question.answer == "".join(pairs[base] for base in strand)


def test_splits_are_disjoint_and_rows_differ():
    seen = {}
    for split in SPLITS:
        task = science.load(split, levels=LEVELS, size=20)
        texts = [m[0]["content"] for m in task.rows(range(len(task))).messages]
        assert len(set(texts)) == len(texts) == 20 * len(CELLS)
        assert {science.split_of(text) for text in texts} == {split}
        other = science.load(split, levels=LEVELS, size=20, seed=1)
        seen[split] = set(texts) | {
            m[0]["content"] for m in other.rows(range(len(other))).messages
        }
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


def test_loading_is_deterministic():
    task = science.load("train")
    assert len(task) > 4000
    indices = range(0, len(task), 37)
    assert task.rows(indices) == science.load("train").rows(indices)
    assert task.rows([5]) != science.load("train", seed=1).rows([5])
    # Any first rows are a fair sample of domains and levels.
    first = [(c["domain"], c["level"]) for c in task.rows(range(10)).columns]
    assert sorted(first) == sorted(itertools.product(DOMAINS, (1, 2)))
    # A larger size keeps what a smaller one had, in front.
    few = science.load("test", levels=(1,), domains=["physics"], size=3)
    more = science.load("test", levels=(1,), domains=["physics"], size=9)
    assert few.rows(range(3)) == more.rows(range(3))


def test_held_out_levels_one_and_two_are_large_enough():
    for split in ("validation", "test"):
        for domain, level in itertools.product(DOMAINS, (1, 2)):
            task = science.load(split, levels=(level,), domains=[domain])
            assert 48 <= len(task) <= 64


@pytest.mark.parametrize(
    "options",
    [
        {"split": "dev"},
        {"levels": (0,)},
        {"levels": ()},
        {"domains": ["history"]},
        {"size": 0},
    ],
)
def test_bad_options_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        science.load(**options)


def columns(**changes):
    base = {"domain": "physics", "level": 1, "answer": "42", "method": "m", "cases": []}
    return base | changes


@pytest.mark.parametrize(
    ("completion", "reward", "parsed"),
    [
        ("7*6=42 answer 42", 1.0, True),
        ("answer: 42.", 1.0, True),
        ("answer 41 answer 42 ", 1.0, True),
        ("answer 042", 1.0, True),
        ("answer 42 answer 41", 0.0, True),
        ("answer -42", 0.0, True),
        ("answer 42 kg", 0.0, False),
        ("answer 4 2", 0.0, False),
        ("answer 42\n7", 0.0, False),
        ("answer42", 0.0, False),
        ("7*6=42", 0.0, False),
        ("answer", 0.0, False),
        ("", 0.0, False),
        ("answer " + "9" * 5000, 0.0, False),
        ("answer ٤٢", 0.0, False),
    ],
)
def test_numbers_are_read_strictly(completion, reward, parsed):
    result = judge_one(columns(), completion)
    assert (result.reward, result.extra["parsed"]) == (reward, parsed)
    assert (result.feedback is None) == (reward == 1.0)
    if not parsed:
        assert "answer" in result.feedback and "m." not in result.feedback


@pytest.mark.parametrize(
    ("completion", "reward", "parsed"),
    [
        ("answer AUGC", 1.0, True),
        ("CGUA answer AUGC.", 1.0, True),
        ("answer augc", 0.0, False),
        ("answer AUGG", 0.0, True),
        ("answer A U G C", 0.0, False),
    ],
)
def test_sequences_are_read_strictly(completion, reward, parsed):
    result = judge_one(columns(domain="biology", answer="AUGC"), completion)
    assert (result.reward, result.extra["parsed"]) == (reward, parsed)


def test_programs_are_judged_by_what_they_compute():
    asked = columns(domain="programs", answer="x*2+3", cases=[[3, 9], [0, 3], [-2, -1]])
    for program in ("x*2+3", "x+x+3", "3+2*x", "(x+1)*2+1 if x<100 else 0"):
        assert judge_one(asked, f"answer {program}").reward == 1.0
    wrong = judge_one(asked, "answer x*3")
    assert wrong.feedback == "x=0 gives 0, not 3. m."
    for broken in ("x*", "import os", "x**2", "f(x)", "2x", "(x", "x;x", "y+1", ""):
        result = judge_one(asked, f"answer {broken}")
        assert (result.reward, result.extra["parsed"]) == (0.0, False), broken
    large = judge_one(asked, "answer 99999*99999*x")
    assert large.extra["parsed"] and "above" in large.feedback


def test_the_judge_takes_many_and_pickles():
    task = science.load("test", size=2)
    prompts = task.rows(range(len(task)))
    judge = pickle.loads(pickle.dumps(task.judge))
    assert all(v.reward == 1.0 for v in judge(prompts, prompts.demonstrations))
    assert all(v.reward == 0.0 for v in judge(prompts, ["?"] * len(prompts)))
    with pytest.raises(ValueError):
        judge(prompts, ["?"])


@pytest.mark.parametrize(
    ("program", "x", "value"),
    [
        ("x", 7, 7),
        ("1+2*x", 7, 15),
        ("(1+2)*x", 7, 21),
        ("10-3-2", 0, 5),
        ("-x*-2", 3, 6),
        ("--x", 3, 3),
        ("x if x>=3 else 0", 3, 3),
        ("1 if x<0 else 2 if x==0 else 3", 0, 2),
        ("(1 if x!=2 else 5)*2", 2, 10),
        ("x+1 if x*2<=4 else x", 2, 3),
        ("  x + 1 ", 1, 2),
    ],
)
def test_programs_compute_what_python_does(program, x, value):
    assert compile_program(program)(x) == value
    assert eval(program.strip(), {"x": x}) == value  # noqa: S307  (fixed strings above)


def test_final_answer_takes_the_last_marker():
    assert final_answer("answer 1, no: answer 2.") == "2"
    assert final_answer("the answers") is None


@pytest.mark.parametrize(
    "program",
    [
        "(" * 5000,
        "(" * (MAX_DEPTH + 1) + "x" + ")" * (MAX_DEPTH + 1),
        "x" + "+x" * MAX_LENGTH,
        "1 if x else 2",
        "9" * 40,
        "x" * 100_000,
        "-" * 100_000 + "x",
        "x if x<1 else " * 50 + "x",
        "__import__('os')",
        "x\x00",
        "٣",
    ],
)
def test_hostile_programs_are_refused(program):
    with pytest.raises(ProgramError):
        compile_program(program)


def test_values_stay_bounded():
    run = compile_program("*".join(["999999999"] * 8))
    with pytest.raises(ProgramError, match="above"):
        run(1)
    assert compile_program("x*x")(30_000) <= MAX_MAGNITUDE


@given(st.text(st.sampled_from("x0129+-*()<>=! ifels\u0663"), max_size=90))
def test_any_text_compiles_or_is_refused(source):
    try:
        program = compile_program(source)
    except ProgramError:
        return
    try:
        assert abs(program(12)) <= max(MAX_MAGNITUDE, 10**9)
    except ProgramError:
        pass


def test_no_jax_is_imported():
    code = (
        "import sys; import jaxrl_post.tasks.science as s, jaxrl_post.tasks.reprompt;"
        "s.load('test', size=1);"
        "print([m for m in ('jax', 'transformers', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
