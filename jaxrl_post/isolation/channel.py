"""Messages between the judge pool and a worker, through a socket that a judge can find.

A judge that writes into every file descriptor, or closes them, is a bug like others: it
may cost its own verdict and never the pool. So each message carries a mark that only
the two ends know, and the pool never waits for the rest of a message that may not come.
"""

from __future__ import annotations

import pickle
import socket
import struct
from multiprocessing.connection import wait
from typing import Any

MARK_SIZE = 16
_LENGTH = struct.Struct("!Q")
_HEAD = MARK_SIZE + _LENGTH.size


class ForeignBytes(Exception):
    """Something else than the other end wrote into the socket."""


class Channel:
    """One end: sends and receives what can be pickled.

    >>> ours, theirs = socket.socketpair()
    >>> one, other = Channel(ours, bytes(16)), Channel(theirs, bytes(16))
    >>> one.send("question")
    >>> other.receive()
    'question'
    >>> one.close()
    >>> other.close()
    """

    def __init__(self, end: socket.socket, mark: bytes) -> None:
        """Takes an end of a socket pair.

        Args:
          end: a stream socket; closed by `close`.
          mark: `MARK_SIZE` bytes, the same at both ends.
        """
        self._socket, self._mark = end, mark
        self._came = bytearray()
        self._ended = False

    def fileno(self) -> int:
        """For `wait`: there is something to read."""
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        """Sends; returns when the system has taken all of it.

        Raises:
          OSError: the other end is closed, or does not read.
        """
        self.send_bytes(pickle.dumps(message))

    def send_bytes(self, pickled: bytes) -> None:
        """Sends what is pickled already."""
        self._socket.sendall(self._mark + _LENGTH.pack(len(pickled)) + pickled)

    def ready(self) -> bool:
        """Takes what has come, without waiting; whether `receive` has an answer."""
        while not self._ended:
            try:
                more = self._socket.recv(2**16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                more = b""
            self._came += more
            self._ended = not more
        return self._ended or self._foreign() or len(self._came) >= self._end()

    def receive(self) -> Any:
        """The next message, waiting for it.

        Raises:
          EOFError: the other end is closed.
          ForeignBytes: what came is no message.
          Exception: whatever unpickling raises.
        """
        while not self.ready():
            wait([self.fileno()])
        if self._foreign():
            raise ForeignBytes
        end = self._end()
        if len(self._came) < end:
            raise EOFError
        pickled = bytes(self._came[_HEAD:end])
        del self._came[:end]
        return pickle.loads(pickled)

    def close(self) -> None:
        """Closes this end."""
        self._socket.close()

    def _foreign(self) -> bool:
        return not self._mark.startswith(self._came[:MARK_SIZE])

    def _end(self) -> int:
        """Where the first message ends, as far as that is known."""
        if len(self._came) < _HEAD:
            return _HEAD
        return _HEAD + _LENGTH.unpack_from(self._came, MARK_SIZE)[0]
