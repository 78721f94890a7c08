"""The question as the self-teacher sees it: with a solution, with feedback.

The wording is frozen: the embedded base model was trained on it. It is this project's
own; the structure (question, solution, feedback, closing instruction; a section that
has nothing to say is left out) is SDPO's, arXiv 2601.20802.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jaxrl_post.types import Message

_PLACEHOLDER = re.compile(r"\{(prompt|demonstration|feedback)\}")
_THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Templates:
    """The wording of a reprompt.

    ``{demonstration}`` and ``{feedback}`` in `reprompt` are the two sections, rendered
    by the templates of the same name or empty.
    """

    reprompt: str = "{prompt}{demonstration}{feedback}\nsolve it:"
    demonstration: str = "\nworked solution:\n{demonstration}"
    feedback: str = "\nwrong attempt:\n{feedback}"


DEFAULT = Templates()


def _fill(template: str, **values: str) -> str:
    """Replaces placeholders in one pass: braces in `values` mean nothing."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def strip_thinking(text: str) -> str:
    """`text` without its ``<think>...</think>`` parts.

    >>> strip_thinking("<think>7 times 6</think> 42")
    '42'
    """
    return _THINKING.sub("", text)


def reprompt_text(
    prompt: str,
    *,
    demonstration: str | None = None,
    feedback: str | None = None,
    templates: Templates = DEFAULT,
) -> str:
    """A prompt together with what the self-teacher may know about its answer.

    Args:
      prompt: the question as the student saw it.
      demonstration: a correct solution, or None.
      feedback: what was wrong with an attempt, or None.
      templates: the wording.

    Returns:
      The question, the demonstration, the feedback and a closing instruction, in that
      order; the bare question where there is neither. Empty text counts as none.

    >>> print(reprompt_text("7*6?", demonstration="7*6=42 answer 42"))
    7*6?
    worked solution:
    7*6=42 answer 42
    solve it:
    """
    shown = _section(templates.demonstration, demonstration=demonstration)
    told = _section(templates.feedback, feedback=feedback)
    if not shown and not told:
        return prompt
    return _fill(templates.reprompt, prompt=prompt, demonstration=shown, feedback=told)


def _section(template: str, **values: str | None) -> str:
    """A section of the reprompt; empty where it has nothing to say."""
    said = {name: text for name, text in values.items() if text and text.strip()}
    return _fill(template, **said) if said else ""


def reprompt_messages(
    messages: Sequence[Message],
    *,
    demonstration: str | None = None,
    feedback: str | None = None,
    templates: Templates = DEFAULT,
    remove_thinking: bool = False,
) -> tuple[Message, ...]:
    """A conversation whose last message is reprompted; earlier turns are unchanged.

    Args:
      messages: the conversation; its last message holds the question.
      demonstration: a correct solution, or None.
      feedback: what was wrong with an attempt, or None.
      templates: the wording.
      remove_thinking: take ``<think>...</think>`` out of the demonstration.

    Raises:
      ValueError: if there are no messages.
    """
    if not messages:
        raise ValueError("reprompt_messages got no messages; it needs a question.")
    if demonstration is not None and remove_thinking:
        demonstration = strip_thinking(demonstration)
    *earlier, last = messages
    content = reprompt_text(
        last["content"],
        demonstration=demonstration,
        feedback=feedback,
        templates=templates,
    )
    return (*earlier, {**last, "content": content})
