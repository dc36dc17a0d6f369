"""A merge that runs: from plans to published outputs, by one loop or several side by side, and what those share.

What a loop does with a tensor is in loop.py.
"""

from __future__ import annotations

import logging
import re
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergecore._stream import ReadFault
from mergecore.batches import Batch, batched, bytes_of, interleaved, surveys_of
from mergecore.device import Device
from mergecore.errors import InputFault, Interrupted, NonFiniteError
from mergecore.jobs import TensorJob
from mergecore.loop import Loop
from mergecore.methods.base import Coefficients
from mergecore.output import manifest
from mergecore.output.writer import OutputWriter
from mergecore.planning import MergePlan
from mergecore.progress import MergeResult, Progress
from mergecore.reads import count_nonfinite
from mergecore.sources import DTYPES, files_of
from mergecore.survey import Found

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """What was fitted on samples before the merge: coefficients of every merged tensor by its name, and what there is
    to tell of it (JSON values)."""

    coefficients: Mapping[str, Coefficients]
    report: Mapping[str, Any]
    step: str = ""
    steps: int = 0


@dataclass(frozen=True)
class Output:
    """One of the models that a merge writes."""

    plan: MergePlan
    out: Path
    writer: OutputWriter


class Merge:
    """One running merge, or several of the same inputs: `run` takes them from their plans to the published outputs.

    Several differ in methods and parameters only. What they have in common is done once: reads, and statistics of equal
    keys (batches.py). There is a loop for each of `devices`, which may be the same one again, and each holds `share`
    bytes at most (None: as planned). A `fit` is that of a merge that runs alone.
    """

    def __init__(
        self,
        outputs: Sequence[Output],
        devices: Sequence[Device],
        share: int | None,
        progress: Callable[[Progress], None] | None,
        should_stop: Callable[[], bool] | None,
        fit: Fit | None = None,
    ) -> None:
        self.outputs = outputs
        self.spec = outputs[0].plan.spec
        self.fit = fit
        self.fitted = fit.coefficients if fit is not None else {}
        self.found: dict[tuple[int, str], Found] = {}
        plans = [output.plan for output in outputs]
        jobs = [plan.jobs for plan in plans]
        finished = [output.writer.finished for output in outputs]
        batches = interleaved(batched(jobs, self.spec, finished, share), outputs[0].writer.lane_of)
        open_scopes = sorted({n for batch in batches for n, job in batch.jobs if job.scope == "model"})
        self.surveys = surveys_of(jobs, open_scopes)
        self.file_numbers = {
            path: number for number, path in enumerate(dict.fromkeys(path for plan in plans for path in plan.files))
        }
        self.loops = [Loop(self, number, device) for number, device in enumerate(devices)]
        self.threads = torch.get_num_threads()

        # Of all loops, guarded by _lock.
        self._lock = threading.RLock()
        self._batches = deque(batches)
        self._running = 1
        self._done = sum(map(len, finished))
        self._read = 0
        self._warnings: list[tuple[str, str, int]] = []  # tensor, text, number of the output
        slots = [(slot.nbytes, name in done) for plan, done in zip(plans, finished, strict=True)
                 for name, slot in plan.layout.slots.items()]  # fmt: skip
        self._written = sum(nbytes for nbytes, is_done in slots if is_done)

        self._report, self._should_stop, self._failed = progress, should_stop, threading.Event()
        self._tensors = sum(map(len, jobs))
        left = sum(each.bytes_to_read for each in self.surveys) + sum(batch.bytes_to_read for batch in batches)
        self._total = bytes_of(jobs, self.spec) if any(finished) else left
        self._read_before = self._total - left
        self._to_write = sum(nbytes for nbytes, _ in slots)
        self._started = time.monotonic()

    def run(self) -> list[MergeResult]:
        """The results in the order of the outputs; bytes read, time and memory are those of all together."""
        if any(output.writer.resumed for output in self.outputs):
            log.info("resuming: %d of %d tensors are done", self._done, self._tensors)
        try:
            if self.surveys:
                self._run_loops(self.loops[:1], lambda loop: loop.survey(self.surveys))
            self._run_loops(self.loops, Loop.run)
        except ReadFault as fault:
            raise InputFault(str(fault)) from fault
        for checkpoint in dict.fromkeys(each for output in self.outputs for each in output.plan.inputs):
            checkpoint.check_unchanged()
        for output in self.outputs:
            output.writer.sync()
        results = []
        retreats = tuple(dict.fromkeys(text for loop in self.loops for text in loop.placement.warnings()))
        for number, output in enumerate(self.outputs):
            result = MergeResult(
                output=output.out,
                method=output.plan.method.name,
                tensors=len(output.plan.jobs),
                bytes_read=self._read,
                bytes_written=output.plan.layout.nbytes,
                seconds=time.monotonic() - self._started,
                peak_rss=_peak_rss(),
                resumed=output.writer.resumed,
                warnings=tuple(dict.fromkeys((*output.plan.warnings, *self._warnings_of(number), *retreats))),
            )
            manifest.add_files(output.writer, output.plan, result, self.fit.report if self.fit is not None else None)
            output.writer.publish()
            results.append(result)
        return results

    def _run_loops(self, loops: Sequence[Loop], work: Callable[[Loop], None]) -> None:
        """The work of these loops, side by side; the first one's in this thread. The first error of any stops all, and
        is raised."""
        errors: list[BaseException] = []

        def run(loop: Loop) -> None:
            try:
                try:
                    work(loop)
                except Interrupted:
                    loop.device.flush()  # what is computed is kept
                    raise
            except BaseException as error:
                errors.append(error)
                self._failed.set()
            finally:
                with self._lock:
                    self._running -= 1

        self._running = len(loops)
        others: list[threading.Thread] = []
        try:
            for loop in loops[1:]:
                thread = threading.Thread(target=run, args=(loop,), name=f"loop {loop.number}")
                thread.start()
                others.append(thread)
            run(loops[0])
            for thread in others:
                thread.join()
        except BaseException:  # this thread was interrupted while it waited
            self._failed.set()
            raise
        finally:
            for thread in others:
                thread.join()
            torch.set_num_threads(self.threads)
        if errors:
            raise errors[0]

    # What the loops ask for.

    def claim(self) -> list[Batch]:
        """The batches of the next tensor, which leave its pages to each other, for the loop that asks; none at the
        end."""
        taken: list[Batch] = []
        with self._lock:
            while self._batches and (not taken or self._batches[0].form.name == taken[0].form.name):
                taken.append(self._batches.popleft())
        return taken

    def is_stopping(self) -> bool:
        """Whether the loops should end between two windows."""
        return self._failed.is_set() or (self._should_stop is not None and self._should_stop())

    @property
    def threads_each(self) -> int:
        """Threads of a loop that computes on the CPU: what others leave free is for those that still run."""
        return max(1, -(-self.threads // max(1, self._running)))

    # What they tell.

    def count(self, read: int, written: int, passed: int = 0) -> None:
        """Bytes of windows that were read, of results, and of windows that were planned to be read and need not be."""
        with self._lock:
            self._read += read
            self._written += written
            self._read_before += passed
            self._progress()

    def finished(self, tensors: int) -> None:
        """So many tensors are with the writers."""
        with self._lock:
            self._done += tensors
            self._progress()

    def _progress(self) -> None:
        if self._report is None:
            return
        read = self._read_before + self._read
        self._report(
            Progress(
                tensors_done=self._done,
                tensors_total=self._tensors,
                bytes_read=read,
                bytes_read_total=max(self._total, read),  # some tensors are read more often than planned
                bytes_written=self._written,
                bytes_written_total=self._to_write,
                seconds=time.monotonic() - self._started,
                step=self.fit.step if self.fit is not None else "",
                steps_done=self.fit.steps if self.fit is not None else 0,
                steps_total=self.fit.steps if self.fit is not None else 0,
            )
        )

    def nonfinite(self, job: TensorJob) -> None:
        """Some entries of the inputs of a tensor are NaN or Inf."""
        self.check_finite(job, 1, 0, range(len(self.outputs)))

    def check_finite(self, job: TensorJob, nonfinite: int, overflow: int, numbers: Sequence[int]) -> None:
        """Names what is not finite: the inputs at fault, or the dtype that is too narrow."""
        if not nonfinite and not overflow:
            return
        if nonfinite:
            found = [f"{files_of(source)[0]} ({count_nonfinite(source)} entries)" for source in job.everything]
            found = [text for text in found if "(0 entries)" not in text]
            message = f"{job.name} holds NaN or Inf in " + ", ".join(found or ["the coefficients"])
            advice = "mend the model, or set on_nonfinite: warn to let it through"
        else:
            message = f"{job.name}: {overflow} results overflow {str(DTYPES[job.dtype]).removeprefix('torch.')}"
            advice = "set out_dtype to bfloat16 or float32, or on_nonfinite: warn to write infinities"
        if self.spec.on_nonfinite == "error":
            raise NonFiniteError(f"{message}; {advice}")
        self.warn(job, message, numbers)

    def warn(self, job: TensorJob, message: str, numbers: Sequence[int]) -> None:
        """A warning about a tensor of some of the outputs, told once."""
        with self._lock:
            if all(message != told for _, told, _ in self._warnings):
                log.warning(message)
            self._warnings += [(job.name, message, number) for number in numbers]

    def _warnings_of(self, number: int) -> tuple[str, ...]:
        """What was found in the tensors of an output, in their order."""
        places = {job.name: place for place, job in enumerate(self.outputs[number].plan.jobs)}
        found = [(places[name], message) for name, message, output in self._warnings if output == number]
        return tuple(message for _, message in sorted(found, key=lambda each: each[0]))


def _peak_rss() -> int:
    """Peak resident bytes of this program: what it ran before exec, or its parent, is not counted."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found is not None:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
