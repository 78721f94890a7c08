"""A run folder, read: its config, its metrics, some of its completions."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxrl_post.errors import InputError, one_line
from jaxrl_post.training.metrics import FILE_NAME, read_metrics

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run left behind; whatever is not there yet is empty.

    Attributes:
      path: the run's folder.
      config: ``config.yaml`` as plain data.
      config_text: the same as it is written.
      rows: of ``metrics.jsonl``, by step.
      completion_files: ``completions/step_*.jsonl`` by step.
    """

    path: Path
    config: Mapping[str, Any]
    config_text: str
    rows: Sequence[Row]
    completion_files: Mapping[int, Path]

    @property
    def last_step(self) -> int:
        """The last step done, 0 before the first."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def stages(self) -> dict[str, tuple[int, int]]:
        """First and last step done of each stage by its name; empty without stages."""
        names = list(self._stage_configs)
        done: dict[str, tuple[int, int]] = {}
        for row in self.rows:
            if (number := row.get("stage")) and row["step"]:
                known = number <= len(names)
                name = names[number - 1] if known else f"stage {number}"
                first, _ = done.get(name, (row["step"], 0))
                done[name] = first, row["step"]
        return done

    def setting(self, dotted: str) -> Any:
        """A value of the config, or None: ``run.setting("training.steps")``."""
        return _lookup(self.config, dotted)

    def settings(self, dotted: str) -> list[Any]:
        """The value in every stage in turn, or the one value of a run without any."""
        own = [_lookup(stage, dotted) for stage in self._stage_configs.values()]
        whole = self.setting(dotted)
        return [whole if value is None else value for value in own] or [whole]

    @property
    def _stage_configs(self) -> Mapping[str, Any]:
        stages = self.config.get("stages")
        return stages if isinstance(stages, dict) else {}

    def keys(self) -> list[str]:
        """Names of all metrics that are a number in some row, sorted."""
        return sorted({k for row in self.rows for k, v in row.items() if _number(v)})

    def series(self, key: str) -> list[tuple[int, float | None]]:
        """A metric over the steps that have it, None where it was not finite."""
        return [
            (row["step"], float(row[key]) if _number(row[key]) else None)
            for row in self.rows
            if key in row
        ]

    def completions(self, step: int, limit: int) -> list[dict[str, Any]]:
        """Completions of a step, those of different prompts first, at most `limit`.

        Before the others come those whose tokens the teacher was asked about. One that
        a teacher wrote is among them, where there is one.
        """
        rows = list(itertools.islice(_read_lines(self.completion_files[step]), 4096))
        rows.sort(key=lambda row: "teacher_logps" not in row)
        seen: set[Any] = set()
        first: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for row in rows:
            prompt = str(row.get("prompt_id"))
            (others if prompt in seen else first).append(row)
            seen.add(prompt)
        shown = (first + others)[:limit]
        written = next(filter(is_of_teacher, rows), None)
        if written and not any(map(is_of_teacher, shown)):
            shown[-1] = written
        return shown

    def extremes(self, step: int, limit: int) -> list[list[dict[str, Any]]]:
        """The best and the worst completions of a step, by reward.

        Those whose tokens the teacher was asked about come first among equals. Both are
        empty where all rewards are equal.
        """
        rows = itertools.islice(_read_lines(self.completion_files[step]), 4096)
        judged = [row for row in rows if _number(row.get("reward"))]
        if len({row["reward"] for row in judged}) < 2:
            return [[], []]
        limit = min(limit, len(judged) // 2)
        return [
            sorted(judged, key=lambda r: (s * r["reward"], "teacher_logps" not in r))[
                :limit
            ]
            for s in (-1, 1)
        ]


def read_run(path: str | Path) -> Run:
    """Reads a run folder, also of a run that has just begun or is still going on.

    Raises:
      InputError: where the folder is missing, or is no run.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: there is no such run folder.")
    config, metrics = path / "config.yaml", path / FILE_NAME
    if not (config.exists() or metrics.exists()):
        raise InputError(
            f"{path}: not a run folder, for it has neither config.yaml nor "
            f"{FILE_NAME}. Name a folder that `jaxrl-post train` has written."
        )
    try:
        text = config.read_text(encoding="utf-8") if config.exists() else ""
        tree = yaml.safe_load(text)
        rows = read_metrics(metrics) if metrics.exists() else []
    except yaml.YAMLError as error:
        raise InputError(f"{config} is damaged: {one_line(error)}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    files = {
        int(match[1]): file
        for file in sorted(path.glob("completions/*.jsonl"))
        if (match := re.fullmatch(r"step_(\d+)\.jsonl", file.name))
    }
    return Run(
        path=path,
        config=tree if isinstance(tree, dict) else {},
        config_text=text,
        rows=rows,
        completion_files=files,
    )


def is_of_teacher(row: Row) -> bool:
    """Whether a completion is a demonstration, or begins with one's first tokens."""
    return bool(row.get("teacher") or row.get("teacher_tokens"))


def _lookup(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:  # torn by a process that died while it wrote
                continue
            if isinstance(row, dict):
                yield row


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
