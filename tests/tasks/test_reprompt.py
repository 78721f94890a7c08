"""The frozen reprompt wording, and that inserted text is never interpreted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_post.tasks.reprompt import (
    DEFAULT,
    Templates,
    reprompt_messages,
    reprompt_text,
    strip_thinking,
)

# Real words around every placeholder and brace that a template could trip over.
texts = st.lists(
    st.sampled_from(
        ["{", "}", "{prompt}", "{demonstration}", "{feedback}", "{0}", "%s", "\\g<0>"]
    )
    | st.characters(),
    max_size=12,
).map("".join)
present = texts.filter(str.strip)


def test_the_wording_is_frozen():
    # The embedded base was trained on these bytes.
    assert reprompt_text("Q?", demonstration="D", feedback="F") == (
        "Q?\nworked solution:\nD\nwrong attempt:\nF\nsolve it:"
    )
    assert reprompt_text("Q?", demonstration="D") == (
        "Q?\nworked solution:\nD\nsolve it:"
    )
    assert reprompt_text("Q?", feedback="F") == "Q?\nwrong attempt:\nF\nsolve it:"


@pytest.mark.parametrize("nothing", [None, "", " \n"])
def test_without_sections_the_prompt_stays_as_it_is(nothing):
    assert reprompt_text("Q {x}?", demonstration=nothing, feedback=nothing) == "Q {x}?"


@given(prompt=texts, demonstration=present, feedback=present)
def test_inserted_text_is_inert(prompt, demonstration, feedback):
    templates = Templates(
        "<{prompt}|{demonstration}|{feedback}>", "D{demonstration}", "F{feedback}"
    )
    assert (
        reprompt_text(
            prompt, demonstration=demonstration, feedback=feedback, templates=templates
        )
        == f"<{prompt}|D{demonstration}|F{feedback}>"
    )


def test_templates_may_hold_braces_of_their_own():
    templates = Templates(
        reprompt="{prompt} {json: {}}{feedback}", feedback=" {feedback}"
    )
    assert reprompt_text("Q", feedback="F", templates=templates) == "Q {json: {}} F"


def test_only_the_last_message_changes():
    messages = (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "Q?", "name": "ann"},
    )
    out = reprompt_messages(messages, demonstration="D")
    assert out[0] is messages[0]
    assert out[1] == {
        "role": "user",
        "content": reprompt_text("Q?", demonstration="D"),
        "name": "ann",
    }
    assert messages[1]["content"] == "Q?"
    assert reprompt_messages(messages) == messages


def test_thinking_is_stripped_on_request_only():
    messages = ({"role": "user", "content": "Q?"},)
    thought = "<think>a\nb</think>\n x <think>c</think>y"
    assert strip_thinking(thought) == "x y"
    kept = reprompt_messages(messages, demonstration=thought)
    assert "<think>a" in kept[0]["content"]
    cut = reprompt_messages(messages, demonstration=thought, remove_thinking=True)
    assert cut[0]["content"] == DEFAULT.reprompt.replace("{prompt}", "Q?").replace(
        "{demonstration}", "\nworked solution:\nx y"
    ).replace("{feedback}", "")
    # A demonstration that was nothing but thought leaves no section.
    assert reprompt_messages(
        messages, demonstration="<think>a</think>", remove_thinking=True
    ) == (messages[0],)


def test_no_messages_is_an_error():
    with pytest.raises(ValueError, match="no messages"):
        reprompt_messages((), demonstration="D")
