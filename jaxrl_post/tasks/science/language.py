"""A tiny expression language and its bounded interpreter.

A program is one expression in ``x``: integers, ``+ - *``, unary minus, parentheses,
and ``A if B else C`` with one comparison ``< > <= >= == !=`` as its condition. There
are no names, calls or loops, so that a program ends; limits on length, nesting and
magnitude bound what it costs. Nothing is handed to Python's own evaluator.

    program    := sum [ "if" sum comparison sum "else" program ]
    sum        := term { ("+" | "-") term }
    term       := factor { "*" factor }
    factor     := "-" factor | integer | "x" | "(" program ")"
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

MAX_LENGTH = 80
MAX_DEPTH = 8
MAX_MAGNITUDE = 10**9

_TOKEN = re.compile(r"\s*(?:([0-9]{1,9}(?![0-9]))|(if|else|x|[<>=!]=|[-+*()<>]))")
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}

Program = Callable[[int], int]


class ProgramError(ValueError):
    """A program that does not parse, or leaves its limits."""


def tokenize(source: str) -> list[str]:
    """The symbols of a program.

    >>> tokenize("x*2 if x>=10 else 1")
    ['x', '*', '2', 'if', 'x', '>=', '10', 'else', '1']
    """
    if len(source) > MAX_LENGTH:
        raise ProgramError(f"longer than {MAX_LENGTH} characters")
    tokens, position, source = [], 0, source.rstrip()
    while position < len(source):
        match = _TOKEN.match(source, position)
        if match is None:
            raise ProgramError(f"cannot read {source[position:][:8]!r}")
        tokens.append(match.group(1) or match.group(2))
        position = match.end()
    return tokens


def _bounded(value: int) -> int:
    if abs(value) > MAX_MAGNITUDE:
        raise ProgramError(f"a value is above {MAX_MAGNITUDE}")
    return value


class _Parser:
    """Recursive descent; every method returns the program of what it has read."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = [*tokens, "end"]
        self.depth = 0

    def next_is(self, *symbols: str) -> str | None:
        return self.tokens.pop(0) if self.tokens[0] in symbols else None

    def expect(self, *symbols: str) -> str:
        found = self.next_is(*symbols)
        if found is None:
            raise ProgramError(f"expected {' or '.join(symbols)}, got {self.tokens[0]}")
        return found

    def program(self) -> Program:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ProgramError(f"nested deeper than {MAX_DEPTH}")
        value = self.sum()
        if self.next_is("if"):
            left, compare, right = (
                self.sum(),
                _COMPARE[self.expect(*_COMPARE)],
                self.sum(),
            )
            self.expect("else")
            then, other = value, self.program()

            def choose(x: int) -> int:
                return then(x) if compare(left(x), right(x)) else other(x)

            value = choose
        self.depth -= 1
        return value

    def sum(self) -> Program:
        value = self.term()
        while symbol := self.next_is("+", "-"):
            value = _combine(
                operator.add if symbol == "+" else operator.sub, value, self.term()
            )
        return value

    def term(self) -> Program:
        value = self.factor()
        while self.next_is("*"):
            value = _combine(operator.mul, value, self.factor())
        return value

    def factor(self) -> Program:
        sign = 1
        while self.next_is("-"):
            sign = -sign
        if self.next_is("("):
            inner = self.program()
            self.expect(")")
        elif self.next_is("x"):
            inner = _identity
        elif self.tokens[0].isdecimal():
            inner = _constant(int(self.tokens.pop(0)))
        else:
            raise ProgramError(f"expected a value, got {self.tokens[0]}")
        return inner if sign > 0 else lambda x: -inner(x)


def _identity(x: int) -> int:
    return x


def _constant(number: int) -> Program:
    return lambda x: number


def _combine(
    operation: Callable[[int, int], int], left: Program, right: Program
) -> Program:
    return lambda x: _bounded(operation(left(x), right(x)))


def compile_program(source: str) -> Program:
    """Reads a program; the result maps an integer to an integer.

    Args:
      source: the text, at most `MAX_LENGTH` characters.

    Returns:
      A function of ``x``. It raises `ProgramError` where a value leaves
      ``[-MAX_MAGNITUDE, MAX_MAGNITUDE]``.

    Raises:
      ProgramError: if the text is no program, or too long, or nested too deeply.

    >>> compile_program("(x+3)*2 if x>5 else -x")(7)
    20
    """
    parser = _Parser(tokenize(source))
    program = parser.program()
    parser.expect("end")
    return program
