"""One-line programs: from words, or from examples, to an expression in ``x``."""

from __future__ import annotations

from random import Random

from jaxrl_post.tasks.science.language import compile_program
from jaxrl_post.tasks.science.question import Question

INPUTS = (3, 1, 6, -2, 0, 8, 4, 12)
"""What a program is tried on, apart from the values next to a threshold."""


def _question(
    level: int,
    kind: str,
    variant: str,
    text: str,
    program: str,
    wrong: list[str],
    method: str,
    inputs: tuple[int, ...] = (),
) -> Question | None:
    right = compile_program(program)
    cases = tuple((x, right(x)) for x in dict.fromkeys((*inputs, *INPUTS)))
    for other in map(compile_program, wrong):
        if all(other(x) == y for x, y in cases):
            return None
    return Question(
        "programs",
        level,
        kind,
        variant,
        text,
        solution=f"answer {program}",
        answer=program,
        misconceptions=tuple(f"answer {w}" for w in wrong),
        method=method,
        cases=cases,
    )


def _shift(rng: Random) -> tuple[str, str]:
    """An addition or subtraction: its words and its symbols."""
    n = rng.randint(1, 15)
    return rng.choice(((f"add {n}", f"+{n}"), (f"subtract {n}", f"-{n}")))


def _scale(rng: Random) -> tuple[str, str]:
    n = rng.randint(2, 9)
    words = {2: "double it", 3: "triple it"}.get(n, f"multiply by {n}")
    return words, f"*{n}"


def _scale_shift(rng: Random) -> Question | None:
    (scale, times), (shift, plus) = _scale(rng), _shift(rng)
    return _question(
        1,
        "scale then shift",
        times,
        f"write f(x): {scale}, then {shift}.",
        f"x{times}{plus}",
        [f"(x{plus}){times}"],
        "keep the order of the steps",
    )


def _shift_scale(rng: Random) -> Question | None:
    (scale, times), (shift, plus) = _scale(rng), _shift(rng)
    return _question(
        1,
        "shift then scale",
        times,
        f"write f(x): {shift}, then {scale}.",
        f"(x{plus}){times}",
        [f"x{plus}{times}", f"x{times}{plus}"],
        "a step applies to the whole result",
    )


def _shift_scale_shift(rng: Random) -> Question | None:
    (one, first), (two, times), (three, last) = _shift(rng), _scale(rng), _shift(rng)
    return _question(
        2,
        "shift scale shift",
        times,
        f"write f(x): {one}, then {two}, then {three}.",
        f"(x{first}){times}{last}",
        [f"x{first}{times}{last}", f"(x{first}{last}){times}"],
        "a step applies to the whole result",
    )


def _scale_shift_scale(rng: Random) -> Question | None:
    (one, first), (two, plus), (three, last) = _scale(rng), _shift(rng), _scale(rng)
    return _question(
        2,
        "scale shift scale",
        last,
        f"write f(x): {one}, then {two}, then {three}.",
        f"(x{first}{plus}){last}",
        [f"x{first}{plus}{last}", f"x{first}{last}{plus}"],
        "a step applies to the whole result",
    )


def _branch(rng: Random) -> Question | None:
    word, mark = rng.choice((("above", ">"), ("below", "<")))
    limit = rng.randint(1, 9)
    steps = [_shift(rng), _scale(rng)]
    rng.shuffle(steps)
    (one, then), (two, other) = steps
    condition = f"if x{mark}{limit} else"
    return _question(
        3,
        "branch",
        word,
        f"write f(x): if x is {word} {limit}, {one}, else {two}.",
        f"x{then} {condition} x{other}",
        [f"x{other} {condition} x{then}", f"x{then}"],
        "the first step is for the case named",
        inputs=(limit + 1, limit - 1, limit),
    )


def _long_branch(rng: Random) -> Question | None:
    mark = rng.choice("<>")
    limit = rng.randint(1, 9)
    (one, a), (two, b), (three, c), (four, d) = (
        make(rng) for make in (_shift, _scale, _shift, _scale)
    )
    condition = f"if x{mark}{limit} else"
    return _question(
        4,
        "long branch",
        mark,
        f"write f(x): if x{mark}{limit}, {one}, {two}, else {three}, {four}.",
        f"(x{a}){b} {condition} (x{c}){d}",
        [f"x{a}{b} {condition} x{c}{d}", f"(x{c}){d} {condition} (x{a}){b}"],
        "a step applies to the whole result",
        inputs=(limit + 1, limit - 1, limit),
    )


def _examples(rng: Random) -> Question | None:
    slope, shift = rng.randint(3, 9), rng.randint(1, 9)
    f = compile_program(program := f"x*{slope}+{shift}")
    points = rng.sample(range(1, 8), 3)
    first = points[0]
    return _question(
        5,
        "examples",
        str(first),
        "write f(x): " + ", ".join(f"f({x})={f(x)}" for x in points) + ".",
        program,
        [f"x+{f(first) - first}", f"x*{f(first)}"],
        "find the slope first",
        inputs=tuple(points[1:]),
    )


MAKERS = {
    1: (_scale_shift, _shift_scale),
    2: (_shift_scale_shift, _scale_shift_scale),
    3: (_branch,),
    4: (_long_branch,),
    5: (_examples,),
}
