"""The folder in which jax keeps compiled programs between runs."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path


def check_compilation_cache() -> None:
    """Has jax keep compiled programs, in the user's cache folder if told no other.

    Goes on without where that folder cannot be written, and says so: jax by itself
    warns of each program that it cannot keep. To be called before anything compiles.
    """
    import jax

    path = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not path:
        path = str(default_folder())
        jax.config.update("jax_compilation_cache_dir", path)
        # A small model's programs are small and many: keep them all.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if "://" in path:
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


def default_folder() -> Path:
    """Where programs are kept by default, apart for each kind of processor.

    A home may be shared by machines, and programs for the CPU use what the one that
    compiled them can do, which jax's own key of an entry does not tell.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += next((x for x in lines if x.startswith(("flags", "Features"))), "")
    kind = f"{platform.machine()}-{zlib.crc32(processor.encode()):08x}"
    return Path(caches, "jaxrl_post", "compiled", kind)
