"""The README.md of an exported model: what it was made of, how, and how good it is."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import yaml

from jaxrl_post.report.evaluations import (
    compare_evaluations,
    format_interval,
    format_score,
)
from jaxrl_post.report.run import Run


def model_card(
    run: Run, title: str, *, step: int, code: str | None = None, adapter: bool = False
) -> str:
    """Markdown with the hub's front matter.

    Args:
      run: the run that trained the model.
      title: the model's name.
      step: of the checkpoint that is exported; what came later is left out.
      code: version of the code that trained it, where known.
      adapter: whether it is an adapter, without its base.
    """
    run = replace(run, rows=[row for row in run.rows if row["step"] <= step])
    base = str(run.setting("model.path"))
    front: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and base.count("/") == 1:
        front["base_model"] = base
    front["tags"] = ["jaxrl_post", *(["lora"] if adapter else [])]
    recipes = ", ".join(map(str, dict.fromkeys(run.settings("recipe.name"))))
    seed = run.setting("run.seed")
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {title}",
        f"{'An adapter to' if adapter else 'Trained from'} `{base}` by "
        f"[jaxrl_post](https://pypi.org/project/jaxrl_post/), {recipes}, after "
        f"{step} steps.",
        _list(
            {
                "Recipe": recipes,
                "Data": _data(run),
                "Seed": seed,
                "Temperature of training": run.settings("sampling.temperature")[-1],
                "Adapter": run.setting("model.lora"),
                "Code": code,
            }
        ),
        "## Results",
        _results(run),
        "## Config",
        f"```yaml\n{run.config_text.rstrip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _data(run: Run) -> str:
    task = run.setting("task") or {}
    of_stages = dict.fromkeys(map(str, run.settings("task.name")))
    return f"{', '.join(of_stages)}, split {task.get('split')}"


def _list(facts: dict[str, Any]) -> str:
    lines = [f"- {k}: {v}" for k, v in facts.items() if v is not None]
    return "\n".join(lines)


def _results(run: Run) -> str:
    """Base and model on every evaluation block; the interval is the model's."""
    lines = ["| block | score | base | model | 95 % |", "|---|---|---|---|---|"]
    for comparison in compare_evaluations(run.rows):
        for name in comparison.names:
            base, final = comparison.base.get(name), comparison.final.get(name)
            cells = [format_score(name, x.value) if x else "" for x in (base, final)]
            interval = format_interval(final or base)
            row = (comparison.block, name, *cells, interval)
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) if len(lines) > 2 else "The run was not evaluated."
