"""Tool use: the parser, both ways of judging, and what the feedback gives away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxrl_post import tasks
from jaxrl_post.errors import InputError
from jaxrl_post.tasks import tooluse
from jaxrl_post.types import Prompts, Verdict

SHARED = Path(__file__).parents[2] / "../shared/data/tooluse/test.jsonl"
PROMPT = """Documentation:
bookTable: Books a table.
Parameters: {"place": "string.", "guests": "integer.", "wish": "object."}
Output: a number
cancel: Cancels.
Parameters: {"number": "integer."}
Output: nothing

Begin!
Question: a table for two at Rosa's, please"""
EXPECTED = [
    ("bookTable", {"place": "Rosa's", "guests": 2, "wish": {"window": True}}),
    ("cancel", {"number": 17}),
]


def answer(calls) -> str:
    return json.dumps([{"Action": n, "Action_Input": json.dumps(v)} for n, v in calls])


def written(calls) -> str:
    steps = [
        f"Thought: so\nAction: {n}\nAction Input: {json.dumps(v)}" for n, v in calls
    ]
    return "\n".join(steps)


def judge(completion, calls=EXPECTED, **options) -> Verdict:
    message = {"role": "user", "content": PROMPT}
    columns = {"answer": answer(calls)}
    prompts = Prompts(("q",), ((message,),), (columns,), (None,))
    return tooluse.ToolUse(**options)(prompts, [completion])[0]


@pytest.mark.parametrize(
    "completion",
    [
        written(EXPECTED),
        written(reversed(EXPECTED)),
        written(EXPECTED).replace(": ", ":\t"),
        written(EXPECTED).replace('{"place"', '\n{\n"place"'),
        written(EXPECTED).replace("17", "17.0"),
        written(EXPECTED) + "\nObservation: done {",
    ],
)
def test_right_calls(completion):
    verdict = judge(completion)
    assert (verdict.reward, verdict.success, verdict.feedback) == (1.0, True, None)
    assert verdict.extra["parsed"] is True


@pytest.mark.parametrize(
    ("completion", "told"),
    [
        ("I would book it.", "no line that begins with Action:"),
        ("Action: cancel", "there must be one Action Input"),
        ("Action: cancel\nAction Input: {17}", "not a JSON object"),
        ("Action: cancel\nAction Input: [17]", "not a JSON object"),
        ('Action: cancel\nAction Input: {"number": 17', "not a JSON object"),
        ("Action: cancel\nAction Input: " + '{"a":' * 100_000, "not a JSON object"),
        (written([*EXPECTED, ("eat", {})]), "Call 3 (eat): there is no such tool."),
        (written([EXPECTED[0], ("cancel", {"id": 17})]), "no parameter 'id'"),
        (written([EXPECTED[0], ("cancel", {"number": 71})]), "Call 2 (cancel): the in"),
        (written([EXPECTED[0], ("cancel", {"number": True})]), "the input is not what"),
        (written([*EXPECTED, EXPECTED[1]]), "Call 3 (cancel): this call is not what"),
        (written(EXPECTED[:1]), "needs another call"),
    ],
)
def test_wrong_calls(completion, told):
    verdict = judge(completion)
    assert (verdict.reward, verdict.success) == (0.0, False)
    assert told in verdict.feedback
    # Nothing of what is expected, unless the completion or the prompt has it already.
    for secret in ("Rosa's", "window", "17", "cancel"):
        assert secret in completion or secret not in verdict.feedback
    assert judge(completion, feedback="none").feedback is None
    shown = judge(completion, feedback="answer").feedback
    assert shown.endswith(
        'Expected:\nbookTable {"guests": 2, "place": "Rosa\'s", "wish": {"window": '
        'true}}\ncancel {"number": 17}'
    )


def test_inputs_belong_to_their_calls():
    """The merged inputs are the same; only call by call is it seen that they moved."""
    calls = [("move", {"x": 1}), ("turn", {"y": 2})]
    swapped = [("move", {"y": 2}), ("turn", {"x": 1})]
    assert judge(written(swapped), calls).reward == 0.0
    assert judge(written(swapped), calls, mode="reference").reward == 1.0


def test_the_reference_cannot_read_nested_inputs():
    assert judge(written(EXPECTED), mode="reference").reward == 0.0
    flat = [EXPECTED[1]]
    assert judge(written(flat), flat, mode="reference").reward == 1.0
    assert (
        judge(written([("cancel", {"number": 3})]), flat, mode="reference").reward == 0
    )


def test_the_same_calls_are_one_answer_to_vote_on():
    verdicts = [judge(written(EXPECTED)), judge(written(reversed(EXPECTED)))]
    assert len({verdict.extra["answer"] for verdict in verdicts}) == 1


def test_loading(tmp_path):
    row = {"prompt": PROMPT, "answer": answer(EXPECTED), "idx": 5, "system": None}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    task = tasks.load("tooluse", split="test", source=str(tmp_path))
    prompts = task.rows([0])
    assert prompts.ids == ("tooluse/test/5",)
    assert [message["role"] for message in prompts.messages[0]] == ["user"]
    assert task.judge(prompts, [written(EXPECTED)])[0].success
    for wrong in ("[1]", "no", answer([("f", [1])]), '[{"Action": "f"}]'):
        spoilt = {**row, "answer": wrong}
        (tmp_path / "spoilt.jsonl").write_text(json.dumps(spoilt))
        with pytest.raises(InputError, match="must be a JSON list of"):
            tasks.load("tooluse", source=str(tmp_path / "spoilt.jsonl"))
    with pytest.raises(InputError, match="expected 'calls' or 'reference'"):
        tasks.load("tooluse", split="test", source=str(tmp_path), mode="regex")


@pytest.mark.skipif(not SHARED.exists(), reason="no rows beside the checkout")
def test_the_answers_of_real_rows_are_right():
    task = tasks.load("tooluse", split="test", source=str(SHARED))
    prompts = task.rows(range(len(task)))
    completions = [
        written(tooluse.expected_calls(row["answer"])) for row in prompts.columns
    ]
    verdicts = task.judge(prompts, completions)
    assert len(task) == 68 and all(verdict.success for verdict in verdicts)
    # What the reference makes of right answers: an object inside an input, a tool whose
    # name is no word.
    reference = tooluse.ToolUse("reference")(prompts, completions)
    refused = zip(prompts.ids, reference, strict=True)
    refused = {name for name, verdict in refused if not verdict.success}
    assert refused == {"tooluse/test/4072", "tooluse/test/4079"}
