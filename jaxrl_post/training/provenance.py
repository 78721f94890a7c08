"""Which code a run was made by."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import jaxrl_post


@functools.cache
def code_version() -> str:
    """The package's version and, where git tracks its source, the commit.

    Returns:
      For example ``"0.1.0"``, ``"0.1.0 (3f2a9c41d0b7)"``, or, where tracked files
      differ from the commit, ``"0.1.0 (3f2a9c41d0b7-dirty)"``.
    """
    folder = Path(jaxrl_post.__file__).parent
    # A package installed below someone else's repository has none of its commits.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return jaxrl_post.__version__
    commit = _git(
        folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"
    )
    return f"{jaxrl_post.__version__} ({commit})" if commit else jaxrl_post.__version__


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            # It only looks, and must leave no lock behind when it dies.
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
