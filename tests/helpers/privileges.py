"""What the system forbids to everybody but root, forbidden to root too."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION_3, _DAC_OVERRIDE, _DAC_READ_SEARCH = 0x20080522, 1, 2


@contextmanager
def as_file_modes_say() -> Iterator[None]:
    """Within it this thread, and those it starts, may do with files what their modes
    say, though it be root (of Linux)."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(_VERSION_3, 0)  # 0: the calling thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; high bits after

    def call(function):
        if function(head, sets):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    call(libc.capget)
    before = sets[0]
    sets[0] = before & ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    call(libc.capset)
    try:
        yield
    finally:
        sets[0] = before
        call(libc.capset)
