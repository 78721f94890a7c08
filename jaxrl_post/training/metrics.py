"""Metrics on disk: ``metrics.jsonl``, one JSON object per step, each step once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

FILE_NAME = "metrics.jsonl"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, in the order of their steps.

    A last line without its end, left by a process that died while it wrote, is
    skipped.

    Args:
      path: the file, or the run's folder that holds it.

    Raises:
      FileNotFoundError: where there is none.
      ValueError: for a line before the last that is no row.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {number}: not a JSON object with a 'step': {line[:80]!r}"
            ) from None
        rows.append(row)
    return rows


class MetricsWriter:
    """Appends a run's rows to its ``metrics.jsonl``; every row is on disk when written.

    JSON knows neither NaN nor infinity: such a value is written as null, and counted
    in the row's ``non_finite``.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with MetricsWriter(folder) as writer:
    ...     writer.write({"step": 1, "loss": 0.5})
    ...     writer.write({"step": 2, "loss": float("nan")})
    >>> with MetricsWriter(folder, resumed_step=1) as writer:
    ...     writer.write({"step": 2, "loss": 0.25})
    >>> read_metrics(folder)
    [{'step': 1, 'loss': 0.5}, {'step': 2, 'loss': 0.25}]
    """

    def __init__(self, run_dir: str | Path, *, resumed_step: int | None = None) -> None:
        """Opens the file, made if absent.

        Args:
          run_dir: the run's folder.
          resumed_step: last step that the run's state contains; rows of later steps,
            which will be done again, are dropped. -1 for a run that begins again, None
            to keep every row.
        """
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        old = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        rows = read_metrics(self.path) if old else []
        last = math.inf if resumed_step is None else resumed_step
        kept = [row for row in rows if row["step"] <= last]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if text != old:
            replace_text(self.path, text)
        self._last_step = kept[-1]["step"] if kept else -1
        self._file = open(self.path, "a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends `row`, whose ``step`` must be later than that of the row before.

        Args:
          row: ``step`` and metrics by name: numbers, NumPy or JAX scalars, text, None.
        """
        step = int(row["step"])
        if step <= self._last_step:
            raise ValueError(
                f"{self.path} already has step {self._last_step}; step {step} would be "
                "written twice or out of order."
            )
        self._file.write(to_json({**row, "step": step}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._last_step = step

    def close(self) -> None:
        """Closes the file; a closed writer writes no more."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def to_json(row: Mapping[str, Any]) -> str:
    """A row as a JSON object; NaN and infinities are null, ``non_finite`` many.

    >>> to_json({"step": 1, "reward/mean": np.float32(0.5), "loss": float("nan")})
    '{"step": 1, "reward/mean": 0.5, "loss": null, "non_finite": 1}'

    Raises:
      ValueError: for a value that is neither a number nor text nor None.
    """
    values = {name: _plain(name, value) for name, value in row.items()}
    lost = [
        name
        for name, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if lost:
        values |= {**dict.fromkeys(lost), "non_finite": len(lost)}
    return json.dumps(values, allow_nan=False)


def replace_text(path: str | Path, text: str) -> None:
    """Writes a file so that a crash leaves the old content or the new, nothing else."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    array = np.asarray(value)
    if array.shape or array.dtype.kind not in "biuf":
        if array.dtype.kind == "V" and not array.shape:  # bfloat16 of ml_dtypes
            return float(value)
        raise ValueError(
            f"metric {name!r} must be a number, text or None, got a "
            f"{type(value).__name__} of shape {array.shape}."
        )
    return array.item()
