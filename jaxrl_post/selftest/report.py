"""All checks, one after the other, and what they were made on."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxrl_post.errors import one_line
from jaxrl_post.selftest.formulas import check_losses, check_vocabulary
from jaxrl_post.selftest.measured import Measured
from jaxrl_post.selftest.programs import check_attention, check_gap, check_mesh

Check = Callable[[], Iterable[Measured]]

CHECKS: Mapping[str, Check] = {
    "losses": check_losses,
    "vocabulary": check_vocabulary,
    "attention": check_attention,
    "sampler": check_gap,
    "mesh": check_mesh,
}
"""Every check by name; each may measure several things."""

_PACKAGES = ("jaxrl_post", "jax", "jaxlib", "libtpu", "flax", "optax", "numpy")


@dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
      device: kind, platform and number of the devices.
      versions: of Python and the packages that matter.
      seconds: of each check, compilation included.
      measured: in the order of the checks.
    """

    device: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every bound is kept."""
        return all(one.passed for one in self.measured)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "passed": self.passed,
            "device": dict(self.device),
            "versions": dict(self.versions),
            "seconds": self.seconds,
            "checks": [one.to_dict() for one in self.measured],
        }


def run(
    checks: Mapping[str, Check] = CHECKS,
    report: Callable[[Measured], None] = lambda one: None,
) -> Report:
    """Runs the checks on this process's devices.

    A check that raises counts as failed, and the others go on.

    Args:
      checks: by name.
      report: is called with each measurement as soon as it is there.
    """
    device = jax.local_devices()[0]
    result = Report(
        device={
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.local_device_count(),
        },
        versions={"python": platform.python_version(), **_versions()},
    )
    for name, check in checks.items():
        start = time.perf_counter()
        try:
            for one in check():
                result.measured.append(one)
                report(one)
        except Exception as error:  # whatever a compiler or a driver raises
            failed = Measured(name, float("nan"), 0.0, one_line(error))
            result.measured.append(failed)
            report(failed)
        result.seconds[name] = round(time.perf_counter() - start, 1)
    return result


def _versions() -> dict[str, str]:
    installed = {}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
