"""One run in several processes: how they start, and how they agree.

Every process runs the same program on one mesh of all their devices. What the host
decides has to be the same everywhere, or the processes wait for each other for ever:
it is computed from values that all of them have, and what may fail in one of them fails
in all. With one process everything here is a plain call.
"""

from __future__ import annotations

import functools
import pickle
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jaxrl_post.errors import InputError, one_line

T = TypeVar("T")

_AGREED = "_raised_in_every_process"

_HEADER, _SMALL = 8, 4096
"""Bytes: the length of a message, and the whole of one that needs a single exchange."""


def start(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    start_timeout: float = 300,
    heartbeat_timeout: float = 30,
) -> None:
    """Joins the processes of a run; before anything else that jax does.

    Args:
      coordinator: ``host:port`` of process 0; None, as for the two below: found by jax,
        which knows TPU pods, Slurm and Open MPI.
      count: processes in all.
      index: of this one, from 0.
      start_timeout: seconds that processes wait for each other.
      heartbeat_timeout: seconds of silence after which a process is taken for lost,
        and all others end.

    Raises:
      InputError: nothing answers at the coordinator's address, or jax finds no cluster.
    """
    if coordinator is not None and index:  # jax would end the process without a word
        _await(coordinator, start_timeout)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=round(start_timeout),
            heartbeat_timeout_seconds=round(heartbeat_timeout),
            # At their ends they wait for each other: not for one that has not noticed.
            shutdown_timeout_seconds=round(1.5 * heartbeat_timeout),
        )
    except (RuntimeError, ValueError, OSError) as error:
        where = "the cluster" if coordinator is None else f"coordinator {coordinator}"
        raise InputError(
            f"the processes of this run cannot be joined by {where}: {one_line(error)}"
        ) from error


def is_main() -> bool:
    """Whether this process writes what all of them have made."""
    return jax.process_index() == 0


def gather(fn: Callable[[], T]) -> list[T]:
    """What `fn` returns in each process, in their order.

    >>> gather(lambda: 3)
    [3]

    Args:
      fn: called here; its result is pickled.

    Raises:
      InputError: `fn` raised one, in this process or another.
      RuntimeError: it raised something else in another process.
    """
    if jax.process_count() == 1:
        return [fn()]
    raised: Exception | None = None
    try:
        message: Any = (True, fn())
    except Exception as error:
        if hasattr(error, _AGREED):  # by a call inside this one
            raise
        raised = error
        known = isinstance(error, InputError)
        message = (
            False,
            (type(error), str(error))
            if known
            else (RuntimeError, one_line(error, 4000)),
        )
    messages = [pickle.loads(x) for x in _exchange(pickle.dumps(message))]
    for index, (done, value) in enumerate(messages):
        if not done:
            kind, text = value
            # Not called: a subclass may want more than the text.
            failure = raised or kind.__new__(kind, f"process {index}: {text}")
            setattr(failure, _AGREED, True)
            raise failure
    return [value for _, value in messages]


def together(fn: Callable[[], T]) -> T:
    """`fn()`, which may fail in one process only: it then fails in all of them."""
    results: list[T] = []
    gather(lambda: results.append(fn()))
    return results[0]


def on_main(fn: Callable[[], T]) -> T:
    """`fn()` of process 0, as every process's result."""
    return gather(lambda: fn() if is_main() else None)[0]  # type: ignore[return-value]


def in_shares(count: int, fn: Callable[[slice], Sequence[T]]) -> list[T]:
    """`fn` over `count` rows, each process's share computed there, whole for all.

    >>> in_shares(3, lambda rows: range(3)[rows])
    [0, 1, 2]

    Args:
      count: of rows.
      fn: gives a list with an entry for each row of a slice.
    """
    here, of = jax.process_index(), jax.process_count()
    own = slice(here * count // of, (here + 1) * count // of)
    return [x for share in gather(lambda: list(fn(own))) for x in share]


def is_spread(x: Any) -> bool:
    """Whether no process holds the array whole."""
    whole = not isinstance(x, jax.Array) or x.is_fully_addressable
    return not (whole or x.is_fully_replicated)


def fetch(x: Any) -> Any:
    """The array; whole on this host, where it was spread over processes."""
    if not is_spread(x):
        return x
    return multihost_utils.process_allgather(x, tiled=True)


def place(x: Any, sharding: Sharding) -> jax.Array:
    """Lays out an array that every process has whole."""
    if sharding.is_fully_addressable or isinstance(x, jax.Array):
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Puts what lies on no device in particular on every device of a mesh.

    Programs of arrays that lie somewhere are others than those of arrays that do not:
    without this the second update would be compiled anew.
    """
    if mesh is None:
        return tree
    everywhere = _everywhere(mesh)
    return jax.tree.map(
        lambda x: x if not isinstance(x, jax.Array) or x.committed else everywhere(x),
        tree,
    )


@functools.cache
def _everywhere(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


def _exchange(message: bytes) -> list[bytes]:
    """Everybody's message, by one collective where all are small, else by two."""

    def send(size: int) -> np.ndarray:
        whole = len(message).to_bytes(_HEADER, "little") + message
        row = np.frombuffer(whole[:size].ljust(size, b"\0"), np.uint8)
        return np.asarray(multihost_utils.process_allgather(row))

    rows = send(_SMALL)
    ends = [_HEADER + int.from_bytes(row[:_HEADER].tobytes(), "little") for row in rows]
    if max(ends) > _SMALL:
        rows = send(1 << (max(ends) - 1).bit_length())  # few sizes, few programs
    return [row[_HEADER:end].tobytes() for row, end in zip(rows, ends, strict=True)]


def _await(coordinator: str, timeout: float) -> None:
    """Returns when somebody listens there."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            left = max(end - time.monotonic(), 0.1)
            socket.create_connection((host.strip("[]"), int(port)), left).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise InputError(
                    f"coordinator {coordinator}: nothing answered within {timeout:g} s "
                    f"({one_line(error)}); process 0 listens there: start it, and see "
                    "that its host and port can be reached from here."
                ) from None
            time.sleep(0.2)
