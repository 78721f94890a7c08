from __future__ import annotations

import pytest

from jaxrl_post.tasks.extraction import final_answer, last_boxed, last_tagged


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{4}", "4"),
        (r"\boxed{1}, no, \boxed {2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} is it", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"} \boxed{3} }", "3"),
        (r"\boxed{}", ""),
        ("boxed{4}", None),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>A</answer>", "A"),
        ("<answer>A</answer><answer>\nB\n</answer> C", "B"),
        ("<answer>A", "A"),
        ("A</answer> B", "A"),
        (" A\n", "A"),
        ("<ANSWER>A</ANSWER>", "<ANSWER>A</ANSWER>"),
    ],
)
def test_last_tagged(text, expected):
    assert last_tagged(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer> 4 </answer> is my reply", "4"),
        (r"The answer is \boxed{4}.", "4"),
        ("#### 4\n", "4"),
        ("####\n4", "4"),
        ("The answer is: **4**.", "4"),
        ("ANSWER = 4", "4"),
        ("Answer: Paris, France.\nBye", "Paris, France"),
        ("<answer>The answer is 4</answer>", "4"),
        ("the answer is 3.\nthe answer is 4.", "4"),
        ("4", None),
        ("The answers are 4 and 5", None),
        ("The answer is", None),
        (r"\boxed{}", None),
    ],
)
def test_final_answer(text, expected):
    assert final_answer(text) == expected


def test_a_mark_without_an_acceptable_answer_is_passed_over():
    text = "#### 4\nThe answer is clear."
    assert final_answer(text) == "clear"
    assert final_answer(text, accept=str.isdigit) == "4"


class CountingText(str):
    """Text that counts the characters that slices of it copy."""

    copied = 0

    def __getitem__(self, key):
        piece = super().__getitem__(key)
        CountingText.copied += len(piece)
        return piece


def test_long_repetitions_are_not_copied_again_and_again():
    text = CountingText(r"\boxed{" * 10_000)
    CountingText.copied = 0
    assert last_boxed(text) is None
    assert final_answer(text) is None
    # A copy of the rest at every opening brace would be 5,000 times the text.
    assert CountingText.copied <= len(text)
