"""The figures of the embedded base model: what it can do at which temperature."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.models.policy import Policy
from jaxrl_post.models.stack import unstack_params
from jaxrl_post.tasks import science
from jaxrl_post.tasks.reprompt import reprompt_text

CONTEXT, RESPONSE, CHUNK = 104, 32, 512


class Answerer:
    """Answers texts with one set of parameters; a plain batched sampler."""

    def __init__(self, policy: Policy, params, tokenizer, seed: int = 0) -> None:
        self.policy, self.tokenizer = policy, tokenizer
        self.params = unstack_params(params)
        self.key = jax.random.key(seed)

    @partial(jax.jit, static_argnums=0)
    def _generate(self, params, contexts, mask, key, temperature):
        policy, (batch, size) = self.policy, contexts.shape
        positions = jnp.cumsum(mask, -1) - 1
        cache = policy.init_cache(batch, size).unstack()
        hidden, filled = policy.hidden(params, contexts, positions, mask, cache)
        cache = policy.init_cache(batch, RESPONSE).replace(prefix=filled.as_prefix())
        head, eos = policy.unembedding(params), self.tokenizer.eos_token_id
        lengths = mask.sum(-1)

        def choose(hidden, step):
            logits = (hidden @ head.T)[:, : policy.vocab_size]
            noise = jax.random.gumbel(jax.random.fold_in(key, step), logits.shape)
            return jnp.argmax(logits + temperature * noise, -1).astype(jnp.int32)

        def body(carry):
            step, token, done, out, cache = carry
            out = out.at[:, step].set(jnp.where(done, eos, token))
            done |= token == eos
            hidden, cache = policy.hidden(
                params,
                token[:, None],
                (lengths + step)[:, None],
                jnp.ones((batch, 1), jnp.int32),
                cache,
            )
            return step + 1, choose(hidden[:, 0], step + 1), done, out, cache

        def running(carry):
            return (carry[0] < RESPONSE) & ~carry[2].all()

        start = (
            0,
            choose(hidden[:, -1], 0),
            jnp.zeros(batch, bool),
            jnp.full((batch, RESPONSE), eos),
            cache.unstack(),
        )
        return jax.lax.while_loop(running, body, start)[3]

    def __call__(self, texts: Sequence[str], temperature: float) -> list[str]:
        """One answer per text; temperature 0 is greedy."""
        prompts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True
            )["input_ids"]
            for text in texts
        ]
        # Sorted by length, so that short prompts run in narrow chunks.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), CHUNK):
            chosen = order[start : start + CHUNK]
            longest = len(prompts[chosen[-1]])
            size = next(s for s in (24, 40, 72, CONTEXT) if longest <= s)
            contexts = np.zeros((CHUNK, size), np.int32)
            mask = np.zeros((CHUNK, size), np.int32)
            mask[:, -1] = 1
            for r, i in enumerate(chosen):
                contexts[r, size - len(prompts[i]) :] = prompts[i]
                mask[r, size - len(prompts[i]) :] = 1
            self.key, key = jax.random.split(self.key)
            out = self._generate(self.params, contexts, mask, key, temperature)
            texts_out = self.tokenizer.batch_decode(
                np.asarray(out)[: len(chosen)], skip_special_tokens=True
            )
            for i, text in zip(chosen, texts_out, strict=True):
                answers[i] = text
        return answers


def pass_at_k(successes: np.ndarray, samples: int, k: int) -> float:
    """Mean over questions of the unbiased estimate 1 - C(n-c, k) / C(n, k)."""
    wrong = samples - successes
    missed = np.ones(len(successes))
    for i in range(k):
        missed *= np.maximum(wrong - i, 0) / (samples - i)
    return float(1 - missed.mean())


def _judged(answerer, prompts, texts, temperature, samples):
    """Rewards and parsed flags ``[questions, samples]``, and the answers' feedback."""
    judge = science.ScienceJudge()
    index = np.repeat(np.arange(len(texts)), samples)
    answers = answerer([texts[i] for i in index], temperature)
    verdicts = judge(prompts.take(index.tolist()), answers)
    shape = (len(texts), samples)
    return (
        np.array([v.reward for v in verdicts]).reshape(shape),
        np.array([v.extra["parsed"] for v in verdicts]).reshape(shape),
        np.array([v.feedback for v in verdicts], object).reshape(shape),
    )


def figures(
    answerer: Answerer, *, split: str = "test", size: int = 64, hard_size: int = 32
) -> dict:
    """All figures, by level: see the keys."""
    result: dict = {"split": split, "levels": {}}
    easy: list[tuple[np.ndarray, np.ndarray]] = []
    for level in science.LEVELS:
        n, samples = (size, 16) if level < 3 else (hard_size, 64)
        task = science.load(split, levels=(level,), size=n)
        prompts = task.rows(range(len(task)))
        questions = [m[-1]["content"] for m in prompts.messages]
        judged = partial(_judged, answerer, prompts)
        reward, parsed, feedback = judged(questions, 1.0, samples)
        greedy = judged(questions, 0.0, 1)[0][:, 0]
        cool = judged(questions, 0.6, 16)[0]
        shown = [
            reprompt_text(q, demonstration=d)
            for q, d in zip(questions, prompts.demonstrations, strict=True)
        ]
        told = [
            next((f for f in feedback[i, :4] if f), None) for i in range(len(questions))
        ]
        failed = [i for i, f in enumerate(told) if f]
        hinted = _judged(
            answerer,
            prompts.take(failed),
            [reprompt_text(questions[i], feedback=told[i]) for i in failed],
            1.0,
            4,
        )[0]
        count = reward.sum(-1)
        domains = np.array([c["domain"] for c in prompts.columns])
        figure = {
            "questions": len(questions),
            "t1": reward.mean(),
            "t0.6": cool.mean(),
            "greedy": greedy.mean(),
            "parsed": parsed.mean(),
            "pass@16": pass_at_k(count, samples, 16),
            "with_demonstration": judged(shown, 1.0, 4)[0].mean(),
            "with_feedback": hinted.mean(),
            "without_feedback": reward[failed].mean(),
            "domains": {d: reward[domains == d].mean() for d in science.DOMAINS},
        }
        if level > 2:
            figure["pass@64"] = pass_at_k(count, samples, 64)
        else:
            easy.append((reward.mean(-1), greedy))
        result["levels"][level] = figure
    average, greedy = (np.concatenate(x) for x in zip(*easy, strict=True))
    below = average < 0.5
    result["below_half"] = int(below.sum())
    result["greedy_fails_below_half"] = 1 - greedy[below].mean()
    return jax.tree.map(lambda x: round(float(x), 4) if isinstance(x, float) else x, result)


def table(result: dict) -> str:
    """The figures as a Markdown table."""
    names = (
        "t1", "t0.6", "greedy", "pass@16", "pass@64", "parsed",
        "with_demonstration", "with_feedback", "without_feedback",
    )  # fmt: skip
    lines = ["| level | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for level, figure in result["levels"].items():
        cells = (f"{figure[n]:.3f}" if n in figure else "" for n in names)
        lines.append(f"| {level} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
