"""The folder in which jax keeps compiled programs between runs."""

from __future__ import annotations

import os
import sys
import tempfile


def check_compilation_cache() -> None:
    """Goes on without the compilation cache where it cannot be written, and says so.

    jax by itself warns of each program that it cannot keep. To be called before
    anything compiles.
    """
    import jax

    path = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not path or "://" in path:
        return
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path, buffering=0) as file:
            file.write(b"room?")
    except OSError as error:
        jax.config.update("jax_enable_compilation_cache", False)
        print(
            f"warning: the compilation cache {path!r} cannot be written "
            f"({error.strerror}); going on without one. Let "
            "JAX_COMPILATION_CACHE_DIR name a folder that can.",
            file=sys.stderr,
        )
