"""What systemd is told: readiness, status and signs of life, as datagrams to $NOTIFY_SOCKET (sd_notify's protocol)."""

from __future__ import annotations

import os
import socket


def notify(*assignments: str) -> bool:
    """Send e.g. "READY=1" to the service manager; False if none listens. Never raises."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            # A leading @ stands for the NUL of an abstract socket.
            channel.connect("\0" + address[1:] if address[0] == "@" else address)
            channel.sendall("\n".join(assignments).encode())
        return True
    except OSError:
        return False


def watchdog_interval() -> float | None:
    """Seconds between two WATCHDOG=1, half of what systemd allows; None if it does not watch this process."""
    try:
        if int(os.environ.get("WATCHDOG_PID", os.getpid())) != os.getpid():
            return None
        allowed = int(os.environ["WATCHDOG_USEC"])
    except (KeyError, ValueError):
        return None
    return allowed / 2e6 if allowed > 0 else None
