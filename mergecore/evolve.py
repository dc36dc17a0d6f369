"""The search for parameters of a spec by CMA-ES: candidates are merged, scored and deleted; the best one is the result.

N. Hansen, The CMA Evolution Strategy: A Tutorial (arXiv:1604.00772), by its author's library `cma`. What a score is:
scoring.py. What is written of the search: history.py.

While it runs the folder `.NAME.evolve` beside the output NAME holds a journal of every scored candidate, and the one at
work. To resume is to ask the strategy the same questions with the same seed and to tell it the answers of the journal.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import xxhash

from mergecore import __version__
from mergecore.errors import (
    CheckpointError,
    InputFault,
    Interrupted,
    MergecoreError,
    OutputError,
    OutputExistsError,
    SpecError,
)
from mergecore.history import Evolved, Trial
from mergecore.inputs import Resolve
from mergecore.output.stages import LockedFolder
from mergecore.output.staging import Journal, Staging, reporting
from mergecore.output.verify import MANIFEST_NAME
from mergecore.planning import MergePlan, plan
from mergecore.progress import MergeResult, Progress, SearchProgress
from mergecore.references import local_folder
from mergecore.scoring import Scorer, open_scorer, texts
from mergecore.spec import MergeSpec, filled, written

log = logging.getLogger(__name__)

Show = Callable[[Progress], None]
REPORT_INTERVAL = 1.0
"""Seconds between two reports while a candidate is scored."""
FATAL = (Interrupted, OutputError, OutputExistsError, InputFault, CheckpointError)
"""Errors that are not the candidate's own."""


class Run(Protocol):
    """Merges a spec without a search."""

    def __call__(
        self, spec: MergeSpec, out: Path, *, resume: bool, progress: Show | None, evolved: Evolved | None = None
    ) -> MergeResult: ...


def evolve(
    spec: MergeSpec,
    out: Path,
    run: Run,
    *,
    resume: bool,
    resolve: Resolve | None,
    progress: Show | None,
    should_stop: Callable[[], bool] | None,
) -> MergeResult:
    """Searches as `spec.evolve` says and merges the best candidate into `out`; the result counts all merges.

    Scored candidates are kept beside `out` for `resume` until the result is there. Raises what `run` raises, and
    MergecoreError if no candidate of a generation could be merged and scored.
    """
    resolve = resolve or partial(local_folder, directory=spec.directory)
    folder = out.absolute().parent / f".{out.name}.evolve"
    planned = plan(spec, resolve=resolve, stages=folder / "stages")
    strategy = _Strategy(spec)
    scorer = open_scorer(spec, resolve)
    head = {"search": _identity(spec, planned, resolve)}
    _refuse_taken(out, folder, head)
    with LockedFolder(folder) as locked:
        search = _Search(spec, out, folder, planned, run, scorer, progress, should_stop)
        records = search.journal.read() if resume else []
        try:
            if records[:1] == [head]:
                log.info("resuming: %d candidates are scored", len(records) - 1)
                search.journal.go_on()
            else:
                if records:
                    log.warning("search started from zero: the spec, an input or mergecore has changed")
                search.journal.start(head)
            search.search(strategy, [Trial(**record) for record in records[1:]] if records[:1] == [head] else [])
            result = search.merge_best(resume)
        except BaseException as error:
            search.clear(keep_candidate=isinstance(error, Interrupted))
            if search.trials:
                raise
            locked.remove()
            raise
        finally:
            search.journal.close()
        locked.remove()
    return result


class _Search:
    """A search that runs: the trials so far, and the journal of those that are scored."""

    def __init__(
        self,
        spec: MergeSpec,
        out: Path,
        folder: Path,
        planned: MergePlan,
        run: Run,
        scorer: Scorer,
        progress: Show | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        assert spec.evolve is not None
        self.spec, self.evolve, self.out, self.planned = spec, spec.evolve, out, planned
        self.run, self.scorer, self.report, self.should_stop = run, scorer, progress, should_stop
        self.journal = Journal(folder / "journal.jsonl")
        self.candidate = folder / "candidate"
        self.trials: list[Trial] = []
        self.sign = -1.0 if spec.evolve.score.direction == "maximise" else 1.0
        self.started = self.reported = time.monotonic()
        merges = [*(earlier for _, earlier in planned.earlier), planned]
        self.one = Progress.start(merges)

    @property
    def best(self) -> Trial | None:
        """The first of the trials with the best score."""
        scored = [trial for trial in self.trials if trial.score is not None]
        return min(scored, key=lambda trial: self.sign * (trial.score or 0.0), default=None)

    def search(self, strategy: _Strategy, known: Sequence[Trial]) -> None:
        """All generations; `known` trials are not tried again."""
        left = list(known)
        for generation in range(1, self.evolve.generations + 1):
            asked = strategy.ask()
            failed: list[Trial] = []  # in no journal as long as all have failed: then the fault is not the candidates'
            scored = False
            for number, values in enumerate(asked, 1):
                trial = left.pop(0) if left else self._try(generation, number, values)
                failed = [*failed, trial] if trial.score is None else failed
                self.trials.append(trial)
                ...
            strategy.tell(...)
