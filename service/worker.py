"""One job in a process of its own: running/JOB/spec.yaml -> a merged model below the outputs folder.

    python -m service.worker JOB_DIR --outputs DIR [--models DIR ...] [--memory BYTES] [--allow-commands]
    python -m service.worker --wait         loads everything, and gets these arguments later (handover.py)

Exit codes: 0 done, 1 the merge failed, 2 the spec or an input is wrong, 3 stopped by SIGTERM or SIGINT and resumable,
4 its plan says that it needs more than BYTES of memory.
A dropped spec is untrusted: it can name models only below the --models folders (if any are given) and an output only
below the outputs folder, and its commands are run only with --allow-commands. The only part of service/ that imports
torch.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import faulthandler
import logging
import os
import re
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mergecore.confined import confined
from mergecore.errors import CheckpointError, Interrupted, MergecoreError, OutputExistsError, SpecError
from mergecore.output.stages import search_folder, stages_folder
from mergecore.printable import PrintableFormatter, printable, printable_lines
from mergecore.references import local_folder
from mergecore.starting import importing
from service.duplicates import UNLIKE_ANY, done_before, fingerprint, running_before
from service.durable import utc_now, write_atomic
from service.handover import WAIT, wait_for_job
from service.leases import Tenancy, is_leased, job_of
from service.publishing import Workplace, is_taken, published_by
from service.spool import DAEMON_PID, ERROR, MORE_MEMORY, SPEC, Spool
from service.status import JobStatus, read_status, write_status

if TYPE_CHECKING:
    from mergecore import Progress
    from mergecore.spec import MergeSpec

log = logging.getLogger("mergecore.worker")

REPORT_INTERVAL = 0.5
"""Seconds between two writes of status.json."""
COUNTED = ("tensors_done", "bytes_read", "bytes_written")
"""Progress that the daemon's counters add up, without what earlier attempts did."""


class Stop:
    """Set by SIGTERM and SIGINT, and when the lease on the job has run out; the merge asks after every window."""

    requested = False

    def __init__(self, tenancy: Tenancy) -> None:
        self._tenancy = tenancy

    def install(self) -> None:
        """Take over both signals for the rest of the process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def __call__(self) -> bool:
        return self.requested or self._tenancy.over()

    def check(self) -> None:
        """Raise Interrupted if a stop was requested."""
        if self():
            raise Interrupted("stopped before the merge began")


class Reporter:
    """Keeps status.json current from a thread of its own, so that the heartbeat goes on during a long window."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._status = read_status(folder, strict=True)
        self._status.pid = os.getpid()
        self._before: dict[str, int] = {}
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # apart, so that a slow disk under the spool does not hold up the merge
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    @property
    def spec_name(self) -> str:
        """What the spec was called when it was dropped."""
        return self._status.spec or SPEC

    @property
    def output(self) -> str:
        """The output that an earlier attempt had begun; empty at the first."""
        return self._status.output

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def record(self, **changes: Any) -> None:
        """Change fields of the status and make them durable now."""
        with self._lock:
            for key, value in changes.items():
                setattr(self._status, key, value)
        self._write(durable=True)

    def progress(self, progress: Progress) -> None:
        """Take over how far the merge is; written with the next heartbeat."""
        if not self._before:
            # A resumed merge reports what earlier attempts did along with its first window.
            counts = dataclasses.asdict(progress) if progress.tensors_done else {}
            self._before = {f"{key}_before": counts.get(key, 0) for key in COUNTED}
        now = {"ratio": round(progress.ratio, 6), **dataclasses.asdict(progress), **self._before, "updated": utc_now()}
        with self._lock:
            self._status.progress = now

    def wait(self, other: str, stop: Stop) -> None:
        """Say that another job is waited for, and wait a moment."""
        with self._lock:
            self._status.progress = {"waiting_for": other, "updated": utc_now()}
        self._ended.wait(REPORT_INTERVAL)
        stop.check()

    @property
    def status(self) -> JobStatus:
        """What is written."""
        return self._status

    def stop(self) -> None:
        """Write a last time and end the thread."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._write(durable=True)

    def _run(self) -> None:
        while not self._ended.wait(REPORT_INTERVAL):
            with contextlib.suppress(OSError):  # a full disk shows in the merge itself
                self._write(durable=False)

    def _write(self, durable: bool) -> None:
        with self._writing:
            with self._lock:
                self._status.heartbeat = utc_now()
                self._status.resident_bytes = resident_bytes()
                status = dataclasses.replace(self._status)
            write_status(self._folder, status, durable=durable)


def main(arguments: list[str] | None = None) -> int:
    """Run one job; the exit code."""
    if (sys.argv[1:] if arguments is None else arguments) == [WAIT]:
        faulthandler.enable()
        follow_daemon()
        prefer_to_be_killed()
        arguments = wait_for_job(load_merging)
        if arguments is None:
            return 0
    parser = argparse.ArgumentParser(prog="python -m service.worker", description="Run one job of the spool.")
    parser.add_argument("job", type=Path, help="the job's folder, with its spec.yaml")
    parser.add_argument("--outputs", type=Path, required=True, help="merged models appear below it")
    parser.add_argument("--models", type=Path, nargs="+", action="extend", default=[], help="where models may lie")
    parser.add_argument("--memory", type=int, help="bytes that the merge may hold, whatever the spec says")
    parser.add_argument("--allow-commands", action="store_true", help="specs may name commands that score candidates")
    options = parser.parse_args(arguments)

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    tenancy = Tenancy(options.job)
    stop = Stop(tenancy)
    stop.install()
    faulthandler.enable()
    follow_daemon()
    prefer_to_be_killed()
    reporter = Reporter(options.job)
    reporter.start()
    try:
        return run(options, reporter, stop, tenancy)
    except Interrupted as error:
        log.info("%s", error)
        return error.exit_code
    except MergecoreError as error:
        if tenancy.over():
            log.info("another daemon may have this job: %s", error)
            return Interrupted.exit_code
        report_error(options.job, reporter, str(error))
        return error.exit_code
    except BaseException as error:
        if tenancy.over():
            log.info("another daemon may have this job: %s", error)
            return Interrupted.exit_code
        what = str(error) or type(error).__name__
        report_error(options.job, reporter, f"unexpected error: {type(error).__name__}: {what}")
        return 1
    finally:
        with contextlib.suppress(OSError):
            reporter.stop()


def run(options: argparse.Namespace, reporter: Reporter, stop: Stop, tenancy: Tenancy) -> int:
    """Merge; 0, or MORE_MEMORY. Raises MergecoreError."""
    folder, outputs, models = options.job, options.outputs, options.models
    spec = load(folder / SPEC, reporter.spec_name)
    if spec.evolve is not None and spec.evolve.score.command is not None and not options.allow_commands:
        message = "this server runs no commands of specs (allow_commands in its configuration); score by text"
        raise spec.error(message, "evolve", "score", "command")
    reporter.record(method=printable(spec.merge_method)[:100])
    out = output_path(spec, job_of(folder), outputs)
    begun = reporter.output == str(out)
    if not begun and is_duplicate(spec, folder, models, reporter, stop):
        return 0
    if not is_taken(out):
        reporter.record(output=str(out))
    stop.check()

    load_merging()
    import mergecore

    def resolve(model: str, revision: str | None) -> Path:
        return find_model(model, revision, models)

    def merge(place: Path) -> dict[str, Any]:
        return mergecore.merge(
            spec,
            place,
            memory=None if options.memory is None else min(options.memory, spec.run.memory),
            resume=True,
            progress=reporter.progress,
            should_stop=stop,
            resolve=resolve,
        ).as_dict()

    log.info("merging to %s", out)
    workplace = Workplace(folder, outputs, out, tenancy) if is_leased(folder) else None
    try:
        with confinement(models, outputs, out if workplace is None else workplace.place):
            if options.memory is not None and (held := held_by_fit(spec, resolve)) > options.memory:
                log.info("its plan says that it holds %d bytes; %d were granted", held, options.memory)
                reporter.record(memory=held)
                return MORE_MEMORY
            former = reporter.status.former_leases
            result = merge(out) if workplace is None else workplace.merge(spec, former, merge)
    except OutputExistsError:
        published = published_by(spec, out) if begun else None
        if published is None:
            raise
        log.info("an earlier attempt had published it and died before it could say so")
        result = published
    log.info("done: %s", result)
    with contextlib.suppress(OSError):  # the model is there: exit code 0 says so too
        reporter.record(output=str(out), result=result)
    return 0


def load_merging() -> None:
    """Load torch and all that a merge needs."""
    with importing():
        import mergecore.merging  # noqa: F401


def held_by_fit(spec: MergeSpec, resolve: Callable[[str, str | None], Path]) -> int:
    """Bytes that a merge holds which runs models on samples, by its plan; 0 for others, which keep to run.memory."""
    merges = [merge for merge in (*spec.earlier, spec) if any(merge.data())]
    if not merges:
        return 0
    from mergecore.features.fitting import held_bytes
    from mergecore.planning import plan

    planned = plan(spec, resolve=resolve)
    fits = [merge for merge in (planned, *(earlier for _, earlier in planned.earlier)) if merge.data]
    return max(map(held_bytes, fits), default=0)


def is_duplicate(spec: MergeSpec, folder: Path, models: list[Path], reporter: Reporter, stop: Stop) -> bool:
    """Whether another job has done the same; if so, the status names it. One that is at it is waited for."""
    same = UNLIKE_ANY
    if not spec.run.force:
        with contextlib.suppress(MergecoreError, OSError):  # the merge says what is wrong, and where
            same = fingerprint(spec, lambda model, revision: find_model(model, revision, models))
    reporter.record(fingerprint=same)  # also for those that wait for ours
    if same == UNLIKE_ANY:
        return False
    spool = Spool(folder.absolute().parent.parent)
    while (other := running_before(spool, reporter.status)) is not None:
        reporter.wait(other.job, stop)
    first = done_before(spool, same)
    if first is None:
        return False
    log.info("the same was done by %s: %s (run.force runs it again)", first.job, first.output)
    reporter.record(output=first.output, result={"duplicate_of": first.job, "output": first.output})
    return True


def load(path: Path, name: str) -> MergeSpec:
    """The spec at `path`, called `name` in messages. Raises SpecError.

    It is a file of anybody's: links are not followed, nothing is waited for, and a hard link could be to a file that
    only the daemon may read.
    """
    with importing():
        from mergecore.spec import parse_spec
        from mergecore.spec.yaml_lines import MAX_BYTES

    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise SpecError(f"{name}: not a plain file")
            if status.st_nlink > 1:
                raise SpecError(f"{name}: the file has another name (a hard link); drop a copy")
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = "not a plain file; links are not followed" if error.errno == errno.ELOOP else error.strerror
        raise SpecError(f"{name}: cannot be read: {reason}") from error
    return parse_spec(text, name, path=path)


def find_model(model: str, revision: str | None, roots: list[Path]) -> Path:
    """Where a model or adapter that a spec names lies: below one of `roots`, after resolving links.

    It is a path, relative to any of them, or the name of one in the local Hugging Face cache whose snapshot lies below
    them. Without roots any path goes, and a relative one starts at the working directory. Raises CheckpointError.
    """
    if not roots:
        return local_folder(model, revision)
    shown = ", ".join(str(root) for root in roots)
    outside = CheckpointError(f"{model!r} does not lie below a model folder of this server ({shown})")
    try:
        real_roots = [root.resolve() for root in roots]
        candidates = [(root / model).resolve() for root in roots]  # an absolute `model` takes the root's place
        allowed = [path for path in candidates if any(path.is_relative_to(root) for root in real_roots)]
        if not allowed:
            raise outside
        found = next((path for path in allowed if path.exists()), None)
        if found is not None:
            return local_folder(str(found), revision)
        if not any(path.exists() for path in candidates):
            try:
                found = local_folder(model, revision, real_roots[0]).resolve()
            except CheckpointError as error:
                raise CheckpointError(
                    f"{model!r} was not found; the model folders of this server are {shown}; {error}"
                ) from None
            if any(found.is_relative_to(root) for root in real_roots):
                return found
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{model!r} {_not_looked_up(error)}") from error
    raise outside


def confinement(models: list[Path], outputs: Path, out: Path) -> AbstractContextManager[None]:
    """Where a merge to `out` may read, the results of its own earlier merges included, and where it may write.

    `out` is a real path, from `output_path`: what has become a link since then leads out.
    """
    outputs.mkdir(parents=True, exist_ok=True)  # the daemon has made it, a person who runs a worker may not
    inputs = [*(root.resolve() for root in models), stages_folder(out), search_folder(out)] if models else []
    return confined(inputs, [outputs.resolve()])


def output_path(spec: MergeSpec, job: str, outputs: Path) -> Path:
    """Where the result goes: run.output, or else the job's name, below `outputs`. Raises SpecError if it leads away."""
    name = job if spec.run.output is None else spec.run.output
    parts = Path(name).parts
    if Path(name).is_absolute() or not parts or any(part.startswith(".") for part in parts) or not name.isprintable():
        raise spec.error(
            f"{name!r} is not a name below the outputs folder: it must be relative, without '..' and leading dots",
            "run",
            "output",
        )
    root = outputs.resolve()
    try:
        out = (root / name).resolve()
    except (OSError, RuntimeError) as error:
        raise spec.error(_not_looked_up(error), "run", "output") from error
    if not out.is_relative_to(root) or out == root:
        raise spec.error(f"{name!r} leads out of the outputs folder {outputs}", "run", "output")
    return out


def _not_looked_up(error: OSError | ValueError | RuntimeError) -> str:
    """A path that cannot even be looked up: too long, a null byte, a loop of links."""
    reason = "a loop of symbolic links" if isinstance(error, RuntimeError) else getattr(error, "strerror", str(error))
    return f"cannot be looked up: {reason}"


def report_error(folder: Path, reporter: Reporter, message: str) -> None:
    """error.txt: one paragraph that says what is wrong, an empty line, the traceback."""
    paragraph = re.sub(r"\n\s*\n", "\n", message.strip()) or "unknown error"
    log.error("%s", paragraph)
    with contextlib.suppress(OSError):
        reporter.record(error=" ".join(printable(paragraph.replace("\n", "; ")).split())[:500])
    with contextlib.suppress(OSError):
        write_atomic(folder / ERROR, printable_lines(f"{paragraph}\n\n{traceback.format_exc()}"))


def follow_daemon() -> None:
    """Be stopped with SIGTERM when the daemon that started this process dies: another one will resume the job."""
    daemon = os.environ.get(DAEMON_PID)
    if daemon is None:
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if str(os.getppid()) != daemon:  # it died before the line above
        os.kill(os.getpid(), signal.SIGTERM)


def prefer_to_be_killed() -> None:
    """Out of memory, the kernel shall take this process before the daemon."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def resident_bytes() -> int:
    """Resident memory of this process; 0 where it cannot be told."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
