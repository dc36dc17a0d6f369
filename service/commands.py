"""The commands that look at a spool and steer it from outside: submit, status, cancel, retry, pause and so on.

They change files only; whatever daemons serve the spool, on whatever hosts, see it.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from mergecore.printable import printable, printable_lines
from service.duplicates import forced
from service.durable import sync_folder, utc_now, write_atomic
from service.errors import ServiceError
from service.incoming import Incoming, is_spec
from service.spool import ERROR, Spool
from service.status import ENDED, JobStatus

ENDED_SHOWN = 20
"""So many done and failed jobs are in the table; JSON has all."""


def submit_command(spec: Path, spool: Path, force: bool = False) -> str:
    """Drop a copy of `spec` into the spool; the name of the dropped file. Waits for nothing.

    `force` sets run.force in the copy: it is run though the same was done before.

    Raises ServiceError if it is no spec's name, cannot be read, or a spec of this name still waits.
    """
    if not is_spec(spec.name):
        raise ServiceError(f"{spec}: specs are files named .yaml, .yml or .json, and not with a leading dot")
    incoming = _open(spool).incoming
    target = incoming / spec.name
    temporary = incoming / f".{spec.name}.{os.getpid()}.tmp"
    try:
        content = spec.read_bytes()
        if force:
            content = forced(content.decode()).encode()
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _rename_new(temporary, target)
        sync_folder(incoming)
    except FileExistsError as error:
        raise ServiceError(f"{target} still waits to be claimed; nothing was submitted") from error
    except OSError as error:
        raise ServiceError(f"cannot submit {spec} to {incoming}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ServiceError(f"{spec}: not UTF-8") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return spec.name


def status_command(spool: Path, job: str | None = None, as_json: bool = False) -> int:
    """Print the jobs of a spool, or one of them: a table for people, or JSON. 0; raises ServiceError.

    `job` is a job's id, the beginning of one, or the name of its spec; the newest of several.
    """
    opened = _open(spool)
    jobs = list_jobs(spool)
    if job is not None:
        found = _matching(jobs, job)
        print(json.dumps(found.as_dict(), indent=1)) if as_json else _print_job(opened, found)
    elif as_json:
        counts: dict[str, int] = {}
        for one in jobs:
            counts[one.state] = counts.get(one.state, 0) + 1
        controls = {"paused": _text(opened.paused), "drain": _text(opened.drain)}
        print(json.dumps({**controls, "counts": counts, "jobs": [one.as_dict() for one in jobs]}, indent=1))
    else:
        if (paused := _text(opened.paused)) is not None:
            print(f"paused by {paused}: nothing is started before `mergecore resume`")
        if (drain := _text(opened.drain)) is not None:
            print(f"drained by {drain}: the daemons of that time end when their jobs have")
        _print_table(jobs)
    return 0


def cancel_command(spool: Path, job: str) -> str:
    """Stop a job, wherever it runs, or take a waiting spec out; what was done. Raises ServiceError.

    The job goes to failed/ in the state `cancelled`; what it has finished is kept for `retry`.
    """
    opened = _open(spool)
    with _reporting("cancel", job):
        for _ in range(3):  # it may move on between the look and the deed
            found = _matching(list_jobs(spool), job)
            if found.state in ENDED:
                raise ServiceError(f"{found.job} cannot be cancelled: it is {found.state}")
            with contextlib.suppress(FileNotFoundError):
                if (done := _cancel(opened, found)) is not None:
                    return done
    raise ServiceError(f"{job} has just moved on; try again")


def retry_command(spool: Path, job: str) -> str:
    """Have a failed or cancelled job run again, from what it had finished; its id. Raises ServiceError."""
    opened = _open(spool)
    found = _matching(list_jobs(spool), job)
    if ENDED.get(found.state) != "failed":
        raise ServiceError(
            f"{found.job} cannot be retried: it is {found.state}, and only failed and cancelled jobs can"
        )
    with _reporting("retry", found.job):
        opened.retry(found.job)
    return found.job


def pause_command(spool: Path) -> None:
    """Have the daemons of this spool start nothing more until `resume`. What runs goes on. Raises ServiceError."""
    opened = _open(spool)
    with _reporting("pause", spool):
        write_atomic(opened.paused, _signature() + "\n")


def resume_command(spool: Path) -> None:
    """Take `pause` back. Raises ServiceError."""
    opened = _open(spool)
    with _reporting("resume", spool):
        opened.paused.unlink(missing_ok=True)


def drain_command(spool: Path) -> None:
    """Have the daemons that serve this spool now finish what they run and end. Raises ServiceError."""
    opened = _open(spool)
    with _reporting("drain", spool):
        write_atomic(opened.drain, f"{_signature()} ({secrets.token_hex(4)})\n")


def _open(spool: Path) -> Spool:
    if not (spool / "incoming").is_dir():
        raise ServiceError(f"{spool} is not a spool: it has no folder incoming (mergecore serve makes it)")
    return Spool(spool)


def _cancel(spool: Spool, found: JobStatus) -> str | None:
    """Cancel what is waiting or running; None if it is neither any more."""
    if found.state == "queued":
        names = [name for name in os.listdir(spool.incoming) if is_spec(name) and printable(name) == found.spec]
        job = spool.claim(names[0]) if names else None
    else:
        job = spool.own(found.job)
        if job is None:  # somebody's
            spool.request_cancel(found.job, _signature())
            return f"{found.job}: its daemon stops it"
        if job.outcome() is not None:
            job.release()
            raise ServiceError(f"{found.job} cannot be cancelled: it has ended, and the next daemon moves it")
    if job is None:
        return None
    job.cancel(by=_signature())
    return f"{job.name}: cancelled"


def _signature() -> str:
    """Who does this, where and when."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user} on {socket.gethostname()} at {utc_now()}"


def _text(path: Path) -> str | None:
    try:
        return printable(path.read_text(encoding="utf-8", errors="replace").strip()[:200])
    except OSError:
        return None


@contextlib.contextmanager
def _reporting(what: str, whom: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        path = f": {error.filename}" if error.filename else ""
        raise ServiceError(
            f"cannot {what} {whom}: {error.strerror}{path} (these commands run as the daemon's user)"
        ) from error


def list_jobs(spool: Path) -> list[JobStatus]:
    """Every job of a spool: running, queued in the order of their turn, then done and failed, newest first."""
    incoming = Incoming(Spool(spool).incoming)
    queued = incoming.queued()  # before the others: what is claimed meanwhile may be seen twice, but is never missed
    others = Spool(spool).jobs()
    current = [one for one in others if one.state not in ENDED]
    claimed = {one.spec for one in current} - {one.spec for one in incoming.queued()}
    waiting = [one for one in queued if one.spec not in claimed]
    to_start = [one for one in current if one.state == "interrupted"] + waiting
    for one in to_start:
        one.waits_for = "waits for its turn"
    for one in to_start[:1]:
        one.waits_for = _text(Spool(spool).waiting) or "waits for a daemon"
    return current + waiting + [one for one in others if one.state in ENDED]


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
    ended_early = ENDED.get(one.state) == "failed"
    part = f"{100 * ratio:.0f}%" if isinstance(ratio, int | float) and not ended_early else ""
    search = one.progress.get("search")
    if part and one.state not in ENDED and isinstance(search, dict):
        part += f", generation {search.get('generation')}/{search.get('generations')}"
    return part, f"{one.seconds:.1f} s" if one.seconds else ""


def _outcome(one: JobStatus) -> str:
    first = one.result.get("duplicate_of")
    return f"{one.output} (done by {printable(str(first))})" if first else one.output


def _print_table(jobs: list[JobStatus]) -> None:
    ended = [one for one in jobs if one.state in ENDED]
    shown = [one for one in jobs if one.state not in ENDED] + ended[:ENDED_SHOWN]
    rows = []
    for one in shown:
        part, seconds = _figures(one)
        told = one.waits_for or one.error or _outcome(one)
        rows.append(tuple(map(printable, (one.job, one.state, part, one.method, seconds, told))))
    header = ("job", "state", "progress", "method", "time", "output, error or reason to wait")
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
            print(f"{key}: {printable(str(value))}")
    for key, value in {**one.progress, **one.result}.items():
        if value is not None:
            print(f"  {key}: {printable(str(value))}")
    if ENDED.get(one.state) == "failed":
        with contextlib.suppress(OSError):
            text = (spool.failed / one.job / ERROR).read_text(encoding="utf-8", errors="replace")
            print(f"\n{printable_lines(text.partition(chr(10) + chr(10))[0])}")
