from __future__ import annotations

import os
import socket

from perdure.children import Events


def test_waiting_says_whether_something_happened() -> None:
    events = Events()
    assert events.wait(0) is False
    done: list[str] = []
    events.post(lambda: done.append("posted"))
    assert events.wait(0) is True
    assert done == ["posted"]
    events.close()


def test_writing_is_waited_for_only_while_it_is_wanted() -> None:
    ours, theirs = socket.socketpair()
    events = Events()
    seen: list[str] = []
    events.watch(ours.fileno(), lambda: seen.append("read " + ours.recv(9).decode()), lambda: seen.append("write"))
    assert events.wait(0) is False
    events.want_writable(ours.fileno(), True)
    theirs.send(b"x")
    events.wait(0)
    assert seen == ["write", "read x"]
    events.want_writable(ours.fileno(), False)
    assert events.wait(0) is False
    theirs.close()
    events.wait(0)
    assert seen[-1] == "read ", "the other end's end is something to read"
    events.close()
    ours.close()


def test_an_action_may_let_go_of_what_was_ready_with_it() -> None:
    events = Events()
    pipes = [os.pipe(), os.pipe()]
    called: list[int] = []

    def read(one: int, other: int) -> None:
        called.append(one)
        events.unwatch(other)

    (a, _), (b, _) = pipes
    events.watch(a, lambda: read(a, b))
    events.watch(b, lambda: read(b, a))
    for _, end in pipes:
        os.write(end, b"x")
    events.wait(0)
    assert len(called) == 1
    events.close()
    for pair in pipes:
        for descriptor in pair:
            os.close(descriptor)
