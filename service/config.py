"""The daemon's configuration: one TOML file, overridden by the environment and the command line."""

from __future__ import annotations

import difflib
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from mergecore.sizes import parse_size
from service.errors import ServiceError
from service.leases import LONGEST
from service.ownership import LEASES, LOCKS
from service.retention import KEEP_ALL, Keep, parse_keep

WORKER_COMMAND = (sys.executable, "-P", "-m", "service.worker")

_WHAT = {
    "spool": "a path",
    "outputs": "a path",
    "models": "a list of paths",
    "host": "a host name or address",
    "port": "a port number from 0 to 65535 (0: any free one)",
    "certfile": "a path",
    "keyfile": "a path",
    "client_cafile": "a path",
    "password_file": "a path",
    "jobs": "a whole number, at least 1",
    "warm_workers": "a whole number, at least 0",
    "memory": '"auto" or a size such as 64GiB',
    "threads": "a whole number, at least 0",
    "devices": '"auto" or a list such as ["cuda:0", "cuda:1"]',
    "jobs_per_device": "a whole number, at least 1",
    "ownership": '"auto", "locks" or "leases"',
    "lease_seconds": "a number of seconds from 1 to 3600",
    "rescan": "a number of seconds above 0",
    "settle": "a number of seconds, at least 0",
    "stop_timeout": "a number of seconds, at least 0",
    "attempts": "a whole number, at least 1",
    "retry_delay": "a number of seconds, at least 0",
    "stall_seconds": "a number of seconds above 0",
    "allow_commands": "true or false",
    "keep_done": '"all", a number of jobs, or days such as "30d"',
    "keep_failed": '"all", a number of jobs, or days such as "30d"',
    "worker_command": "a list of strings: a program and its arguments",
}

_PATHS = ("spool", "outputs", "certfile", "keyfile", "client_cafile", "password_file")
FIXED = (*_PATHS, "host", "port", "ownership", "lease_seconds")
"""What cannot change while the daemon runs."""


@dataclass(frozen=True)
class ServeConfig:
    """Everything the daemon is told."""

    spool: Path
    """Holds incoming/, running/, done/ and failed/; one filesystem."""
    outputs: Path
    """Merged models appear below it, and nowhere else."""
    models: tuple[Path, ...] = ()
    """If any: models are read from below these folders only, and relative model paths are looked up in them."""
    host: str = "127.0.0.1"
    """Where the metrics are served."""
    port: int = 9417
    certfile: Path | None = None
    """A certificate chain: the port speaks TLS. With the key in it, or in `keyfile`."""
    keyfile: Path | None = None
    client_cafile: Path | None = None
    """Clients need a certificate that one of these authorities signed."""
    password_file: Path | None = None
    """One line USER:PASSWORD that clients must give (HTTP basic authentication)."""
    jobs: int = 1
    """Workers at once."""
    warm_workers: int = 0
    """Idle workers that have loaded what a merge needs, for jobs to start on at once (pool.py)."""
    memory: int | None = None
    """Bytes that they may hold together, by what their specs and plans say; None: what the host or the cgroup has."""
    threads: int = 0
    """Threads that they may compute with together; 0: not counted."""
    devices: tuple[str, ...] | None = None
    """GPUs that jobs may use, each job one of them; None: those that are found."""
    jobs_per_device: int = 1
    """So many jobs may use a GPU at once."""
    ownership: str = "auto"
    """How daemons tell whose job is whose: locks, leases (leases.py), or as the spool says and locks for a new one."""
    lease_seconds: float = 120.0
    """Seconds without a sign of life after which another daemon takes a job over."""
    rescan: float = 5.0
    """Seconds between looks at the folders that happen without any event."""
    settle: float = 1.0
    """Seconds without a change after which a dropped file counts as complete."""
    stop_timeout: float = 60.0
    """Seconds that workers get to stop and keep their work when the daemon stops; then they are killed."""
    attempts: int = 3
    """How often a job is started whose worker dies of a signal; then the job fails."""
    retry_delay: float = 10.0
    """Seconds before the second attempt; twice as many before each further one."""
    stall_seconds: float = 600.0
    """Seconds without a finished window, CPU time and reading after which a worker counts as hung and is aborted."""
    allow_commands: bool = False
    """Whether a spec may name a command that scores its candidates: it runs with the daemon's rights."""
    keep_done: Keep = KEEP_ALL
    """Which jobs stay in done/; outputs are never removed."""
    keep_failed: Keep = KEEP_ALL
    worker_command: tuple[str, ...] = WORKER_COMMAND
    """Gets JOB_DIR --outputs DIR [--models DIR]... --memory BYTES [--allow-commands] appended; to be a warm one, --wait
    (handover.py)."""

    @property
    def agreed_ownership(self) -> str | None:
        """LOCKS or LEASES; None: as the spool says."""
        return None if self.ownership == "auto" else self.ownership


def load_config(file: Path | None, overrides: Mapping[str, Any] | None = None) -> ServeConfig:
    """The configuration in `file`, with environment variables and then `overrides` on top.

    A variable's name is MERGECORE_ and a key in capitals; its value is TOML, or plain text. An override that is None
    counts as not given.

    Relative paths in the file are relative to its folder. Raises ServiceError naming the key, what was found and what
    was expected.
    """
    settings: dict[str, Any] = {}
    if file is not None:
        settings = {key: _checked(key, value, str(file), file.parent) for key, value in _read(file).items()}
    for key in _WHAT:
        name = f"MERGECORE_{key.upper()}"
        if name in os.environ:
            settings[key] = _checked(key, _parsed(os.environ[name]), f"environment variable {name}", Path())
    for key, value in (overrides or {}).items():
        if value is not None:
            settings[key] = _checked(key, value, "command line", Path())
    for one in fields(ServeConfig):
        if one.default is MISSING and one.name not in settings:
            where = f' or write {one.name} = "..." into {file}' if file else " or a configuration with --config"
            raise ServiceError(f"no {one.name} folder: give --{one.name} DIR{where}")
    return ServeConfig(**settings)


def _parsed(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ServiceError(f"configuration {file}: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise ServiceError(f"configuration {file}: not valid TOML: {error}") from error


def _checked(key: str, value: Any, where: str, folder: Path) -> Any:
    """`value` as ServeConfig holds it. Raises ServiceError."""
    if key not in _WHAT:
        near = difflib.get_close_matches(key, _WHAT, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_WHAT)}"
        raise ServiceError(f"{where}: unknown key {key}; {hint}")
    problem = ServiceError(f"{where}: {key} is {value!r}, but must be {_WHAT[key]}")
    if key in _PATHS:
        if not isinstance(value, str | Path) or not str(value):
            raise problem
        return (folder / value).absolute()
    if key in ("models", "worker_command"):
        if not isinstance(value, list | tuple) or not all(isinstance(item, str | Path) and str(item) for item in value):
            raise problem
        if key == "models":
            return tuple((folder / item).absolute() for item in value)
        if not value:
            raise problem
        return tuple(str(item) for item in value)
    if key in ("keep_done", "keep_failed"):
        try:
            return parse_keep(value)
        except ValueError:
            raise problem from None
    if key in ("memory", "devices") and value in ("auto", None):
        return None
    if key == "memory":
        try:
            return parse_size(value)
        except ValueError:
            raise problem from None
    if key == "devices":
        if not isinstance(value, list | tuple) or not all(re.fullmatch(r"cuda:\d{1,4}", str(item)) for item in value):
            raise problem
        return tuple(dict.fromkeys(value))
    if key == "host":
        if not isinstance(value, str) or not value:
            raise problem
        return value
    if key == "ownership":
        if value not in ("auto", LOCKS, LEASES):
            raise problem
        return value
    if key == "allow_commands":
        if not isinstance(value, bool):
            raise problem
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise problem
    if key in ("port", "jobs", "attempts", "threads", "jobs_per_device", "warm_workers"):
        least = 0 if key in ("port", "threads", "warm_workers") else 1
        most = 65535 if key == "port" else float("inf")
        if not isinstance(value, int) or not least <= value <= most:
            raise problem
        return value
    if key == "lease_seconds" and not 1 <= value <= LONGEST:
        raise problem
    if not 0 <= value < float("inf") or (key in ("rescan", "stall_seconds") and value == 0):
        raise problem
    return float(value)
