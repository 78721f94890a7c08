"""Messages, halves of messages, and what is none."""

from __future__ import annotations

import socket
import struct

import pytest

from jaxrl_post.isolation.channel import Channel, ForeignBytes

MARK = b"0123456789abcdef"


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    channel = Channel(ours, MARK)
    yield channel, theirs
    channel.close()
    theirs.close()


def test_messages_of_any_size_come_in_order(ends):
    channel, theirs = ends
    other = Channel(theirs, MARK)
    for message in ("a", None, b"x" * 50_000):
        other.send(message)
    assert channel.ready()
    assert [channel.receive() for _ in range(3)] == ["a", None, b"x" * 50_000]
    assert not channel.ready()


def test_half_a_message_is_not_waited_for(ends):
    channel, theirs = ends
    theirs.sendall(MARK[:3])
    assert not channel.ready()
    theirs.sendall(MARK[3:] + struct.pack("!Q", 2**40) + b"the first of a terabyte")
    assert not channel.ready()
    theirs.close()
    assert channel.ready()
    with pytest.raises(EOFError):
        channel.receive()


@pytest.mark.parametrize("noise", [b"\0", b"noise" * 100, MARK[:5] + b"!"])
def test_what_bears_no_mark_is_known_at_once_and_after_messages_too(ends, noise):
    channel, theirs = ends
    Channel(theirs, MARK).send("real")
    theirs.sendall(noise)
    assert channel.ready() and channel.receive() == "real"
    assert channel.ready()
    with pytest.raises(ForeignBytes):
        channel.receive()


def test_a_closed_end_is_an_end(ends):
    channel, theirs = ends
    theirs.close()
    assert channel.ready()
    with pytest.raises(EOFError):
        channel.receive()
