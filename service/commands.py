"""The commands that look at a spool from outside, with or without a daemon: submit and status."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from pathlib import Path

from service.incoming import Incoming, is_spec
from service.spool import ERROR, JobStatus, ServiceError, Spool, printable

ENDED_SHOWN = 20
"""So many done and failed jobs are in the table; JSON has all."""


def submit_command(spec: Path, spool: Path) -> str:
    """Drop a copy of `spec` into the spool; the name of the dropped file. Waits for nothing.

    Raises ServiceError if it is no spec's name, cannot be read, or a spec of this name still waits.
    """
    incoming = spool / "incoming"
    if not is_spec(spec.name):
        raise ServiceError(f"{spec}: specs are files named .yaml, .yml or .json, and not with a leading dot")
    if not incoming.is_dir():
        raise ServiceError(f"{spool} is not a spool: it has no folder incoming (mergecore serve makes it)")
    target = incoming / spec.name
    temporary = incoming / f".{spec.name}.{os.getpid()}.tmp"
    try:
        content = spec.read_bytes()
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _rename_new(temporary, target)
    except FileExistsError as error:
        raise ServiceError(f"{target} still waits to be claimed; nothing was submitted") from error
    except OSError as error:
        raise ServiceError(f"cannot submit {spec} to {incoming}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return spec.name


def status_command(spool: Path, job: str | None = None, as_json: bool = False) -> int:
    """Print the jobs of a spool, or one of them: a table for people, or JSON. 0; raises ServiceError.

    `job` is a job's id, the beginning of one, or the name of its spec; the newest of several.
    """
    if not (spool / "incoming").is_dir():
        raise ServiceError(f"{spool} is not a spool: it has no folder incoming (mergecore serve makes it)")
    jobs = list_jobs(spool)
    if job is not None:
        found = _matching(jobs, job)
        print(json.dumps(found.as_dict(), indent=1)) if as_json else _print_job(Spool(spool), found)
    elif as_json:
        counts: dict[str, int] = {}
        for one in jobs:
            counts[one.state] = counts.get(one.state, 0) + 1
        print(json.dumps({"counts": counts, "jobs": [one.as_dict() for one in jobs]}, indent=1))
    else:
        _print_table(jobs)
    return 0


def list_jobs(spool: Path) -> list[JobStatus]:
    """Every job of a spool: running, queued in the order of their turn, then done and failed, newest first."""
    incoming = Incoming(Spool(spool).incoming)
    queued = incoming.queued()  # before the others: what is claimed meanwhile may be seen twice, but is never missed
    others = Spool(spool).jobs()
    current = [one for one in others if one.state in ("running", "interrupted")]
    claimed = {one.spec for one in current} - {one.spec for one in incoming.queued()}
    waiting = [one for one in queued if one.spec not in claimed]
    return current + waiting + [one for one in others if one.state in ("done", "failed")]


def _rename_new(source: Path, target: Path) -> None:
    """Rename, but never over something: raises FileExistsError."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if target.exists():  # no hard links here: two submits of one name at the same moment would race
            raise FileExistsError(target) from error
        os.rename(source, target)
        return
    # A link tells the daemon nothing; closing a file that was open for writing does.
    with contextlib.suppress(OSError):
        os.close(os.open(target, os.O_WRONLY))


def _matching(jobs: list[JobStatus], wanted: str) -> JobStatus:
    for test in (
        lambda one: one.job == wanted,
        lambda one: one.job.startswith(wanted),
        lambda one: one.spec == wanted,
    ):
        found = [one for one in jobs if test(one)]
        if found:
            return max(found, key=lambda one: one.created)
    raise ServiceError(f"no job {wanted}; `mergecore status` lists them")


def _figures(one: JobStatus) -> tuple[str, str]:
    """Progress and time, for people."""
    ratio = one.progress.get("ratio")
    part = f"{100 * ratio:.0f}%" if isinstance(ratio, int | float) and one.state != "failed" else ""
    return part, f"{one.seconds:.1f} s" if one.seconds else ""


def _print_table(jobs: list[JobStatus]) -> None:
    ended = [one for one in jobs if one.state in ("done", "failed")]
    shown = [one for one in jobs if one.state not in ("done", "failed")] + ended[:ENDED_SHOWN]
    rows = []
    for one in shown:
        part, seconds = _figures(one)
        rows.append((one.job, one.state, part, one.method, seconds, one.error or one.output))
    header = ("job", "state", "progress", "method", "time", "output or error")
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        colours = {"running": "cyan", "interrupted": "yellow", "done": "green", "failed": "red"}
        table = Table(*header, box=box.SIMPLE_HEAD)
        for row in rows:
            # Text, not markup: names come from anybody.
            table.add_row(*(Text(cell, style=colours.get(cell, "") if i == 1 else "") for i, cell in enumerate(row)))
        Console().print(table)
    else:
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        for row in [header, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if len(ended) > ENDED_SHOWN:
        print(f"... and {len(ended) - ENDED_SHOWN} older jobs; --json lists all")


def _print_job(spool: Spool, one: JobStatus) -> None:
    for key, value in one.as_dict().items():
        if value and not isinstance(value, dict):
            print(f"{key}: {value}")
    for key, value in {**one.progress, **one.result}.items():
        print(f"  {key}: {printable(str(value))}")
    if one.state == "failed":
        with contextlib.suppress(OSError):
            text = (spool.failed / one.job / ERROR).read_text(encoding="utf-8", errors="replace")
            print(f"\n{text.partition(chr(10) + chr(10))[0]}")
