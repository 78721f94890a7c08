"""Chat templates: programs that come with a model, run where they can be killed.

transformers renders them in jinja's sandbox, which bounds what a template reaches and
not what it takes: two nested loops, or a text times a billion, are within it. So they
are rendered in a worker of a `JudgePool`, which has a time limit and may hold half of
the machine's memory.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from jaxrl_post.errors import InputError
from jaxrl_post.isolation.pool import JudgePool
from jaxrl_post.types import Message, Prompts, Verdict

SECONDS = 10.0
"""That a few dozen conversations may take."""

MOST = 10_000_000
"""Characters that a conversation may become."""


def render(
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    arguments: Mapping[str, Any],
) -> list[str]:
    """What a tokenizer's chat template makes of conversations that the model goes on.

    Args:
      tokenizer: a transformers tokenizer with a chat template.
      conversations: messages, per prompt.
      arguments: handed to the template.

    Raises:
      InputError: the template fails, or takes too long, too much or makes too much.
    """
    if not conversations:
        return []
    made_of = (tokenizer.chat_template, tokenizer.special_tokens_map, dict(arguments))
    count = len(conversations)
    messages = tuple(tuple(map(dict, turns)) for turns in conversations)
    prompts = Prompts(("",) * count, messages, ({},) * count, (None,) * count)
    verdicts = _pool().judge(_Template(made_of), prompts, ("",) * count)
    for verdict in verdicts:
        if problem := " ".join(verdict.extra.get("error", "").split()):
            raise InputError(
                f"the model's chat template cannot render a conversation ({problem}); "
                "mend the template, or see to its arguments."
            )
    return [verdict.feedback or "" for verdict in verdicts]


@cache
def _pool() -> JudgePool:
    pool = JudgePool(1, timeout=SECONDS, chunk_size=64, warn=False)
    atexit.register(pool.close)
    return pool


class _Template:
    """Arrives in a worker as the function that renders."""

    def __init__(self, made_of: tuple[Any, ...]) -> None:
        self._made_of = made_of

    def __reduce__(self) -> tuple[Callable, tuple[Any, ...]]:
        return _renderer, self._made_of

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
        return _renderer(*self._made_of)(prompts, completions)


def _renderer(
    template: Any, special_tokens: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Callable[[Prompts, Sequence[str]], list[Verdict]]:
    # Not to be told to install torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    tokenizer = PreTrainedTokenizerBase(chat_template=template, **special_tokens)

    def text_of(messages: Sequence[Message]) -> str:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=True,
            **arguments,
        )
        assert isinstance(text, str)  # it is not tokenized
        if len(text) > MOST:
            raise ValueError(f"a text of {len(text)} characters, more than {MOST}")
        return text

    def judge(prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
        return [Verdict(None, feedback=text_of(turns)) for turns in prompts.messages]

    return judge
