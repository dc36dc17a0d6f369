"""status.json: what is known of a job, as its daemon and its worker write it and everybody may read it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from service.durable import write_atomic
from service.leases import job_of

STATUS = "status.json"
ENDED = {"done": "done", "duplicate": "done", "failed": "failed", "cancelled": "failed"}
"""The final states, and in which folder jobs of this state lie."""


@dataclass
class JobStatus:
    """What status.json holds.

    `state`: queued (still in incoming/), running, cancelling, interrupted (in running/, will be resumed), or one of
    ENDED. `fingerprint` is duplicates.py's. `attempts` counts the starts of workers, `deaths` those that ended without
    a report, since the last retry.
    Times are ISO UTC; `seconds` is the time workers spent on the job, over all attempts; `progress` has ratio,
    tensors_done, tensors_total and bytes; `result` is MergeResult.as_dict(); `resident_bytes` is the worker's.
    `memory`: bytes that the plan says the job holds, if that is more than its spec says. `waits_for`: why it is not
    started yet; that stands in no file, commands.py looks it up.
    `lease`: the token of the lease under which a worker was last started; `former_leases`: those of earlier owners,
    each "returned" by one whose worker had ended, or "expired", and then that owner may only be asleep.
    Only one process writes it at a time: the worker while it lives, the job's owner before and after.
    """

    job: str = ""
    state: str = ""
    spec: str = ""
    method: str = ""
    output: str = ""
    fingerprint: str = ""
    created: str = ""
    started: str = ""
    finished: str = ""
    host: str = ""
    pid: int = 0
    heartbeat: str = ""
    attempts: int = 0
    deaths: int = 0
    seconds: float = 0.0
    resident_bytes: int = 0
    memory: int = 0
    lease: str = ""
    waits_for: str = ""
    error: str = ""
    former_leases: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def success(self) -> str:
        """The final state if the worker succeeds: "done", or "duplicate" if it found that another job had done it."""
        return "duplicate" if "duplicate_of" in self.result else "done"

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def read_status(folder: Path, *, strict: bool = False) -> JobStatus:
    """The status of the job in `folder`; what is missing or damaged is left at its default, never an error.

    `strict`, for who writes it again: OSError if there is one that cannot be read.
    """
    status = JobStatus(job=job_of(folder))
    try:
        found = json.loads((folder / STATUS).read_bytes())
    except OSError as error:
        if strict and not isinstance(error, FileNotFoundError):
            raise
        return status
    except (ValueError, RecursionError):
        return status
    if isinstance(found, dict):
        for one in fields(JobStatus):
            value, default = found.get(one.name), getattr(status, one.name)
            if isinstance(value, bool) or value is None:
                continue
            if isinstance(default, float) and isinstance(value, int):
                value = float(value)
            if isinstance(value, type(default)):
                setattr(status, one.name, value)
    status.job = job_of(folder)
    return status


def write_status(folder: Path, status: JobStatus, *, durable: bool = True) -> None:
    """Replace the status of the job in `folder` atomically."""
    write_atomic(folder / STATUS, json.dumps(status.as_dict(), indent=1) + "\n", durable=durable)
