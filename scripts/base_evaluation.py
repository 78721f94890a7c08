"""The figures of the embedded base model: what it can do at which temperature."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from jaxrl_post.generation import Sampler, pad_contexts, tokenize_prompts
from jaxrl_post.models import Policy
from jaxrl_post.tasks import science
from jaxrl_post.tasks.reprompt import reprompt_text
from jaxrl_post.types import Prompts, Verdict

RESPONSE, SLOTS = 32, 512
COLUMNS = (
    "t1",
    "t0.6",
    "greedy",
    "pass@16",
    "pass@64",
    "parsed",
    "with_demonstration",
    "with_feedback",
    "without_feedback",
)


class Answerer:
    """Answers questions with one set of parameters, and judges the answers."""

    def __init__(self, policy: Policy, params, tokenizer, seed: int = 0) -> None:
        self.params, self.tokenizer = params, tokenizer
        self.key = jax.random.key(seed)
        self.sampler = Sampler(
            policy,
            max_new_tokens=RESPONSE,
            slots=SLOTS,
            stop_tokens=(tokenizer.eos_token_id,),
            steps_per_dispatch=8,
        )

    def answers(
        self, texts: Sequence[str], temperature: float, samples: int
    ) -> list[str]:
        """`samples` answers to each text, those of a text adjacent."""
        rows = tokenize_prompts(
            self.tokenizer, [[{"role": "user", "content": text}] for text in texts]
        )
        self.key, key = jax.random.split(self.key)
        rollouts = self.sampler.generate(
            self.params,
            *pad_contexts(rows, multiple=40),
            key=key,
            group_size=samples,
            temperature=temperature,
        )
        return self.tokenizer.batch_decode(
            [
                tokens[mask]
                for tokens, mask in zip(rollouts.tokens, rollouts.mask, strict=True)
            ],
            skip_special_tokens=True,
        )

    def verdicts(
        self, prompts: Prompts, texts: Sequence[str], temperature: float, samples: int
    ) -> tuple[np.ndarray, list[Verdict]]:
        """Rewards ``[questions, samples]`` and the verdicts, row by row."""
        index = [i for i in range(len(texts)) for _ in range(samples)]
        answers = self.answers(texts, temperature, samples)
        verdicts = science.ScienceJudge()(prompts.take(index), answers)
        rewards = np.array([v.reward for v in verdicts])
        return rewards.reshape(len(texts), samples), verdicts


def pass_at_k(rewards: np.ndarray, k: int) -> float:
    """Mean over questions of the unbiased estimate 1 - C(n-c, k) / C(n, k)."""
    samples = rewards.shape[1]
    wrong = samples - rewards.sum(-1)
    missed = np.ones(len(rewards))
    for i in range(k):
        missed *= np.maximum(wrong - i, 0) / (samples - i)
    return 1 - missed.mean()


def level_figures(
    answerer: Answerer, split: str, level: int, size: int
) -> tuple[dict, np.ndarray, np.ndarray]:
    """One level's figures; rewards at temperature 1 and of the greedy answer."""
    task = science.load(split, levels=(level,), size=size)
    prompts = task.rows(range(len(task)))
    questions = [messages[-1]["content"] for messages in prompts.messages]
    samples = 16 if level < 3 else 64
    rewards, verdicts = answerer.verdicts(prompts, questions, 1.0, samples)
    cool, _ = answerer.verdicts(prompts, questions, 0.6, 16)
    greedy, _ = answerer.verdicts(prompts, questions, 0.0, 1)

    shown = [
        reprompt_text(question, demonstration=demonstration)
        for question, demonstration in zip(
            questions, prompts.demonstrations, strict=True
        )
    ]
    informed, _ = answerer.verdicts(prompts, shown, 1.0, 4)

    # Feedback on the model's own attempt: its first wrong one among four. The same
    # questions without feedback are scored on the other samples, not on those four.
    attempts = [verdicts[i * samples : i * samples + 4] for i in range(len(questions))]
    feedback = [
        next((v.feedback for v in four if v.feedback), None) for four in attempts
    ]
    failed = [i for i, text in enumerate(feedback) if text]
    told = [reprompt_text(questions[i], feedback=feedback[i]) for i in failed]
    corrected, _ = answerer.verdicts(prompts.take(failed), told, 1.0, 4)

    domains = np.array([columns["domain"] for columns in prompts.columns])
    figures = {
        "questions": len(questions),
        "samples": samples,
        "t1": rewards.mean(),
        "t0.6": cool.mean(),
        "greedy": greedy.mean(),
        "parsed": np.mean([v.extra["parsed"] for v in verdicts]),
        "pass@16": pass_at_k(rewards, 16),
        "with_demonstration": informed.mean(),
        "with_feedback": corrected.mean(),
        "without_feedback": rewards[failed, 4:].mean(),
        "domains": {d: rewards[domains == d].mean() for d in science.DOMAINS},
    }
    if level > 2:
        figures["pass@64"] = pass_at_k(rewards, 64)
    return figures, rewards, greedy[:, 0]


def figures(
    answerer: Answerer, *, split: str = "test", size: int = 64, hard_size: int = 32
) -> dict:
    """All figures by level, and the share of hard-to-sample questions greedy fails."""
    levels, averages, greedy = {}, [], []
    for level in science.LEVELS:
        rows = size if level < 3 else hard_size
        levels[level], rewards, best = level_figures(answerer, split, level, rows)
        if level < 3:
            averages.append(rewards.mean(-1))
            greedy.append(best)
    below = np.concatenate(averages) < 0.5
    result = {
        "split": split,
        "levels": levels,
        "questions_below_half": int(below.sum()),
        "greedy_fails_below_half": 1 - np.concatenate(greedy)[below].mean(),
    }
    return jax.tree.map(
        lambda x: x if isinstance(x, (int, str)) else round(float(x), 4), result
    )


def table(result: dict) -> str:
    """The figures as a Markdown table."""
    lines = ["| level | " + " | ".join(COLUMNS) + " |", "|---" * 10 + "|"]
    for level, figure in result["levels"].items():
        cells = (f"{figure[name]:.3f}" if name in figure else "" for name in COLUMNS)
        lines.append(f"| {level} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
