"""Prompts that show the feedback on what was sampled for them before."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxrl_post.generation import quote_special_tokens, tokenize_prompts
from jaxrl_post.recipes.groups import Groups
from jaxrl_post.tasks.reprompt import Templates, reprompt_messages
from jaxrl_post.training.completions import completions_file
from jaxrl_post.training.config import Config
from jaxrl_post.types import Message, Prompts


class History:
    """The feedback on all earlier completions of each question, oldest first.

    What does not fit into `task.max_prompt_length` tokens is forgotten, the oldest
    first, and never the question. A resumed run reads the completions it has saved.
    """

    def __init__(self, config: Config, templates: Templates, tokenizer: Any) -> None:
        """Reads nothing yet.

        Args:
          config: of the run.
          templates: the wording.
          tokenizer: a transformers tokenizer.
        """
        self._config, self._templates, self._tokenizer = config, templates, tokenizer
        self._told: dict[str, deque[str]] | None = None

    def show(self, prompts: Prompts, step: int) -> Prompts:
        """The prompts of a step with the feedback on those of the steps before it."""
        if self._told is None:
            self._told = self._saved(step)
        messages = map(self._fit, prompts.ids, prompts.messages)
        return replace(prompts, messages=tuple(messages))

    def add(self, groups: Groups) -> None:
        """Remembers the feedback on a step's completions."""
        assert self._told is not None  # `show` came before
        for name, verdicts in zip(groups.prompts.ids, groups.verdicts, strict=True):
            said = [v.feedback for v in verdicts if v.feedback]
            self._told[name].extend(filter(str.strip, said))

    def _saved(self, step: int) -> dict[str, deque[str]]:
        told: dict[str, deque[str]] = defaultdict(deque)
        for earlier in range(1, step):
            path = completions_file(Path(self._config.run.dir or ""), earlier)
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if (row["feedback"] or "").strip():
                    told[row["prompt_id"]].append(row["feedback"])
        return told

    def _fit(self, name: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        assert self._told is not None
        told = self._told[name]
        while told:
            feedback = quote_special_tokens(self._tokenizer, "\n".join(told))
            shown = reprompt_messages(
                messages, feedback=feedback, templates=self._templates
            )
            (ids,) = tokenize_prompts(
                self._tokenizer,
                [shown],
                chat_template_arguments=self._config.model.chat_template_arguments,
            )
            if len(ids) <= self._config.task.max_prompt_length:
                return shown
            told.popleft()
        return messages
