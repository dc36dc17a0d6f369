"""How a worker that waits gets its job: over a socket, its standard input. Both ends; who keeps such workers: pool.py.

The one message has what a process gets that is started on a job: arguments, environment, standard output with error,
and the descriptors that keep the job owned. No torch here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence

WAIT = "--wait"
"""The only argument of a worker that waits."""
_HELLO = b"."
"""What it says before it loads anything: this program understands the message."""
_MOST_BYTES = 1 << 20
"""Of a message. Most systems' sockets take less."""
_MOST_DESCRIPTORS = 16


def channel() -> tuple[socket.socket, socket.socket]:
    """The daemon's end, which never blocks, and the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a message arrives whole or not at all
    ours.setblocking(False)
    return ours, theirs


def has_greeted(ours: socket.socket) -> bool:
    """Whether the worker has said that it waits; true once only."""
    try:
        return ours.recv(len(_HELLO)) == _HELLO
    except OSError:
        return False


def hand_over(
    ours: socket.socket, arguments: Sequence[str], environment: Mapping[str, str], output: int, owned: Sequence[int]
) -> None:
    """Send a job: the worker takes it up as soon as it has loaded what it needs.

    `environment` is all of it; `output` a descriptor for standard output and error; `owned` others that it keeps open.
    Raises OSError if the worker is dead or the message too long.
    """
    message = json.dumps([list(arguments), dict(environment)]).encode()
    if len(message) > _MOST_BYTES:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    socket.send_fds(ours, [message], [output, *owned])


def wait_for_job(load: Callable[[], None]) -> list[str] | None:
    """In the worker: `load`, and then become the process that would have been started on the job.

    The job's arguments; None if the daemon wants none of it or is dead. An error of `load` is shown and left to the
    job, which meets it again.
    """
    with _moved_from_stdin() as theirs:
        with contextlib.suppress(OSError):
            theirs.send(_HELLO)
        try:
            load()
        except Exception as error:
            print(f"a worker that waits cannot load what it needs: {type(error).__name__}: {error}", file=sys.stderr)
        try:
            message, (output, *_), _, _ = socket.recv_fds(theirs, _MOST_BYTES, _MOST_DESCRIPTORS)
        except (OSError, ValueError):  # no descriptors, and so no message
            return None
    arguments, environment = json.loads(message)
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        os.dup2(output, number)
    os.close(output)
    return list(arguments)


def _moved_from_stdin() -> socket.socket:
    """The socket that is standard input, in whose place is nothing from now on."""
    try:
        theirs = socket.socket(fileno=os.dup(0))
    except OSError as error:
        raise SystemExit(f"{WAIT} is for the daemon, whose socket is standard input: {error.strerror}") from None
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return theirs
