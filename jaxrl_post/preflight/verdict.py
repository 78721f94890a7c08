"""A config against a topology: programs, verdict, and what would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxrl_post.errors import InputError, one_line
from jaxrl_post.preflight.bound import lower_bound
from jaxrl_post.preflight.hardware import Topology
from jaxrl_post.preflight.programs import Program
from jaxrl_post.preflight.remedies import TRAINING, first_micro_batch, remedies, splits
from jaxrl_post.preflight.sampling import compile_sampling
from jaxrl_post.preflight.shapes import Shapes, find_model
from jaxrl_post.preflight.training import compile_training
from jaxrl_post.training.config import Config
from jaxrl_post.training.setup import open_mesh

FITS, DOES_NOT_FIT = "fits", "does not fit"


@dataclass
class _Attempt:
    """A config with some overrides, compiled."""

    overrides: dict[str, Any]
    shapes: Shapes
    limit: float
    only: str | None = None
    programs: dict[str, Program] = field(default_factory=dict)

    @property
    def failing(self) -> frozenset[str]:
        """Programs without room."""
        return frozenset(
            name
            for name, p in self.programs.items()
            if p.error or p.bytes.get("peak", 0) > self.limit
        )

    def excess(self, failing: frozenset[str]) -> float:
        """Bytes by which these programs exceed the limit, as far as it is known."""
        peaks = [self.programs[n].bytes.get("peak") for n in failing]
        return max((p - self.limit for p in peaks if p is not None), default=0.0)


def check(
    config: Config,
    topology: Topology,
    *,
    margin: float = 0.05,
    max_tries: int = 8,
    only: Literal["training", "sampling"] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compiles a config's programs for a topology and judges whether they fit.

    Args:
      config: of a run.
      topology: of the devices it is to run on.
      margin: share of a chip's memory that must stay free.
      max_tries: remedies that are tried where it does not fit.
      only: leave the programs of updates, or of the sampler, out.
      say: gets a line on what is being done.

    Returns:
      ``verdict``; ``programs`` of the config as it is, by name; ``remedy``: None, or
      ``overrides`` that are the cheapest found, whether they make it ``fit``, and the
      ``programs`` then; and what these were computed for. Plain data.

    Raises:
      InputError: the config can run on no such devices, whatever is tried.
    """
    config = config if not config.stages else config.stage(_last(config))
    sizes, source = find_model(config.model.path)
    limit = topology.chip.memory * (1 - margin)

    islands: dict[str, Any] = {}
    if config.mesh.fast_within == "slice":
        islands["mesh.fast_within"] = topology.fast_within

    def shapes_of(overrides: Mapping[str, Any]) -> Shapes:
        changed = _with(config, {**islands, **overrides})
        mesh = open_mesh(changed, devices=topology.devices)
        assert mesh is not None  # as devices were given
        return Shapes.of(changed, sizes, mesh)

    problem: str | None = None
    overrides: dict[str, Any] = {}
    try:
        shapes = shapes_of({})
    except InputError as error:
        problem = str(error)
        say(f"as it is, it cannot be laid out: {problem}")
        found = _first_that_runs(shapes_of, splits(len(topology.devices)))
        if found is None:
            raise
        shapes, overrides = found
    if bounds := first_micro_batch(shapes):
        name, least = next(iter(bounds.items()))
        problem = problem or (
            f"{name} is below the {least} tokens of the smallest part, one sequence "
            "for each shard"
        )
        overrides = {**overrides, **bounds}
        shapes = shapes_of(overrides)

    attempt = _Attempt(overrides, shapes, limit, only)
    _compile(attempt, {}, say)
    first, tried = attempt, list[dict[str, Any]]()
    while attempt.failing:
        after = _next(attempt, shapes_of, tried, max_tries, say)
        if after is None:
            break
        attempt = after
    as_it_is = problem is None
    remedy = None
    if attempt is not first or not as_it_is:
        remedy = {
            "overrides": [f"{k}={_yaml(v)}" for k, v in attempt.overrides.items()],
            "fits": not attempt.failing,
            "programs": _rows(attempt),
            "step": _bound(attempt, topology),
            "tried": len(tried),
        }
    return {
        "verdict": FITS if as_it_is and not first.failing else DOES_NOT_FIT,
        "problem": problem,
        "programs": _rows(first) if as_it_is else {},
        "remedy": remedy,
        "step": _bound(first, topology) if as_it_is else None,
        "resident": first.shapes.resident,
        "topology": topology.name,
        "chips": len(topology.devices),
        "chip": {**dataclasses.asdict(topology.chip), "margin": margin},
        "mesh": dict(first.shapes.mesh.shape),
        "model": {"path": config.model.path, "sizes": source},
    }


def _next(
    attempt: _Attempt,
    shapes_of: Callable[[Mapping[str, Any]], Shapes],
    tried: list[dict[str, Any]],
    max_tries: int,
    say: Callable[[str], None],
) -> _Attempt | None:
    """The attempt with the first remedy more that helps; None where there is none."""
    for change in remedies(attempt.shapes, attempt.failing):
        overrides = {**attempt.overrides, **change}
        if overrides in tried:
            continue
        if len(tried) == max_tries:
            return None
        tried.append(overrides)
        say(f"does not fit: {', '.join(sorted(attempt.failing))}; trying {change}")
        try:
            shapes = shapes_of(overrides)
            after = _Attempt(overrides, shapes, attempt.limit, attempt.only)
            _compile(after, _unchanged(attempt, change), say)
        except InputError as error:
            say(f"not possible: {one_line(error)}")
            continue
        if not after.failing or _helps(attempt, after):
            return after
    return None


def _compile(
    attempt: _Attempt, kept: Mapping[str, Program], say: Callable[[str], None]
) -> None:
    """Compiles what is not kept; stops at what is certain not to fit."""
    attempt.programs.update(kept)
    for part, compile_part, names in (
        ("training", compile_training, TRAINING),
        ("sampling", compile_sampling, {"decode"}),
    ):
        if names & kept.keys() or attempt.only not in (None, part):
            continue
        say(f"compiling {part}")
        for program in compile_part(attempt.shapes):
            attempt.programs[program.name] = program
            peak = program.bytes.get("peak")
            size = "more than there is" if peak is None else f"{peak / 2**30:.2f} GiB"
            say(f"  {program.name}: {size}, in {program.seconds:.0f} s")


def _unchanged(attempt: _Attempt, change: Mapping[str, Any]) -> dict[str, Program]:
    """Programs that a change does not touch."""
    if change.keys() <= {"training.micro_batch_tokens", "model.remat"}:
        return {k: v for k, v in attempt.programs.items() if k not in TRAINING}
    if change.keys() <= {"sampling.slots"}:
        return {k: v for k, v in attempt.programs.items() if k in TRAINING}
    return {}


def _helps(before: _Attempt, after: _Attempt) -> bool:
    """Whether fewer programs fail, or those that do by less."""
    if after.failing < before.failing:
        return True
    failing = before.failing & after.failing
    return after.excess(failing) < before.excess(failing)


def _first_that_runs(shapes_of, changes) -> tuple[Shapes, dict[str, Any]] | None:
    for change in changes:
        try:
            return shapes_of(change), change
        except InputError:
            continue
    return None


def _with(config: Config, overrides: Mapping[str, Any]) -> Config:
    tree = config.to_dict()
    for key, value in overrides.items():
        section, name = key.split(".")
        tree[section] = {**tree[section], name: value}
    return Config.from_dict(tree)


def _last(config: Config) -> str:
    """A run's last stage, which is the one that takes most."""
    return [*config.stages][-1]


def _yaml(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)


def _rows(attempt: _Attempt) -> dict[str, Any]:
    rows = {}
    for name, program in attempt.programs.items():
        row = dataclasses.asdict(program)
        del row["name"]
        row["fits"] = name not in attempt.failing
        rows[name] = row
    return rows


def _bound(attempt: _Attempt, topology: Topology) -> dict[str, Any] | None:
    programs = [*attempt.programs.values()]
    return lower_bound(programs, topology.chip, len(topology.devices))
