"""The search for parameters of a spec by CMA-ES: candidates are merged, scored and deleted; the best one is the result.

While it runs, the folder `.NAME.evolve` beside the output NAME holds a journal of the candidates that have a score, and
the one at work. To resume, the strategy is asked the same questions again and told the answers of the journal. What
a score is: scoring.py; what is written of a search: history.py.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import xxhash

from mergecore.errors import (
    CheckpointError,
    InputFault,
    Interrupted,
    MergecoreError,
    OutputError,
    OutputExistsError,
)
from mergecore.history import Evolved, Trial
from mergecore.inputs import Resolve
from mergecore.output.stages import LockedFolder, search_folder
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
"""What ends a search; other errors are the candidate's own."""


MOST_TOGETHER = 16
"""Candidates that are merged at once."""
RunTogether = Callable[[Sequence[tuple[MergeSpec, Path]], Show | None], int]
"""Merges several specs of the same inputs at once and resumes what was begun; bytes of the windows read."""


class Run(Protocol):
    """A merge without a search."""

    def __call__(
        self, spec: MergeSpec, out: Path, *, resume: bool, progress: Show | None, evolved: Evolved | None = None
    ) -> MergeResult: ...


def evolve(
    spec: MergeSpec,
    out: Path,
    run: Run,
    run_together: RunTogether,
    *,
    resume: bool,
    resolve: Resolve | None,
    progress: Show | None,
    should_stop: Callable[[], bool] | None,
) -> MergeResult:
    """Searches as `spec.evolve` says and merges the best candidate into `out`; the result counts all merges.

    Candidates of one generation are merged together as far as the disk has room for them, since they share inputs.
    Scored candidates are kept beside `out` for `resume` until the result is there. Raises what `run` raises, and
    MergecoreError if no candidate of a generation could be merged and scored.
    """
    resolve = resolve or partial(local_folder, directory=spec.directory)
    out = out.absolute()
    folder = LockedFolder(search_folder(out))
    planned = plan(spec, resolve=resolve, stages=folder.folder / "stages")
    strategy = _Strategy(spec)
    scorer = open_scorer(spec, resolve, planned)
    search = _Search(spec, out, folder, planned, run, run_together, scorer, progress, should_stop)
    identity = _identity(spec, planned, resolve)
    _refuse_taken(out, folder, identity)
    with folder:
        try:
            search.run_all(strategy, search.open(identity, resume))
            result = search.merge_best(resume)
        except BaseException as error:
            search.clear(keep_candidate=isinstance(error, Interrupted))
            if search.best is None and not isinstance(error, Interrupted):
                folder.remove()
            raise
        finally:
            search.journal.close()
        folder.remove()
    return result


def _identity(spec: MergeSpec, planned: MergePlan, resolve: Resolve) -> str:
    """Equal exactly when the search is: spec, inputs, texts and versions (hex, 128 bits)."""
    import cma

    files = [(str(path), path.stat()) for path in texts(spec, resolve)]
    states = [(name, state.st_size, state.st_mtime_ns) for name, state in files]
    what = [spec.identity(), planned.identity(), states, cma.__version__]
    return str(xxhash.xxh3_128_hexdigest(json.dumps(what).encode()))


def _refuse_taken(out: Path, folder: LockedFolder, identity: str) -> None:
    """OutputExistsError if something lies at `out`. If that is the result of this search, which died right after its
    last step, its journal goes."""
    staging = Staging(out)
    try:
        staging.enter()
        staging.leave(keep=True)
    except OutputExistsError:
        with suppress(OSError, ValueError, KeyError, TypeError, OutputError):
            if json.loads((out / MANIFEST_NAME).read_bytes())["evolve"]["search"] == identity:
                with folder:
                    folder.remove()
        raise


class _Search:
    """A search that runs: the trials so far, the journal of those that count, and the candidate at work."""

    def __init__(
        self,
        spec: MergeSpec,
        out: Path,
        folder: LockedFolder,
        planned: MergePlan,
        run: Run,
        run_together: RunTogether,
        scorer: Scorer,
        progress: Show | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        assert spec.evolve is not None
        self.spec, self.evolve, self.out = spec, spec.evolve, out
        self.merges = [*(earlier for _, earlier in planned.earlier), planned]
        self.run, self.run_together, self.scorer = run, run_together, scorer
        self.report, self.should_stop = progress, should_stop
        self.folder = folder
        self.journal = Journal(folder.folder / "journal.jsonl")
        self.identity = ""
        self.trials: list[Trial] = []
        self.merged: list[int] = []
        """Candidates of this generation that are merged and have no score yet, by number."""
        self.alone_to = 0
        """Up to this number candidates are merged one by one: one of them has failed."""
        self.read = 0
        """Bytes read for candidates that were merged."""
        self.one = Progress.start(self.merges)
        self.started = time.monotonic()
        self.reported = -math.inf

    @property
    def best(self) -> Trial | None:
        """The first of the trials with the best score."""
        sign = _sign(self.spec)
        scored = [trial for trial in self.trials if trial.score is not None]
        return min(scored, key=lambda trial: sign * (trial.score or 0.0), default=None)

    def open(self, identity: str, resume: bool) -> list[Trial]:
        """Opens the journal; the trials that an earlier attempt at the same search has made."""
        self.identity = identity
        self.journal.folder = self.folder.inside
        records = self.journal.read() if resume else []
        same = records[:1] == [{"search": identity}]
        with reporting("write", self.journal.path):
            if same:
                self.journal.go_on()
            else:
                self.clear(keep_candidate=False)
                self.journal.start({"search": identity})
        if records and not same:
            log.warning("search started from zero: the spec, an input or mergecore has changed")
        known = [Trial(**record) for record in records[1:]] if same else []
        if known:
            log.info("resuming: %d candidates are known", len(known))
        return known

    def run_all(self, strategy: _Strategy, known: Sequence[Trial]) -> None:
        """All generations; `known` trials, the first ones, are not made again."""
        left = list(known)
        for generation in range(1, self.evolve.generations + 1):
            trials: list[Trial] = []
            unwritten: list[Trial] = []
            asked = strategy.ask()
            self.alone_to = 0
            for number, values in enumerate(asked, 1):
                if left:
                    trial = left.pop(0)
                    self.read += self.one.bytes_read_total
                else:
                    if not self.merged:
                        self._merge_ahead(generation, number, asked[number - 1 :])
                    trial = self._try(generation, number, values)
                    unwritten.append(trial)
                trials.append(trial)
                self.trials.append(trial)
                # A generation of failures only is not the candidates' fault: it is made again, so it is not written.
                if unwritten and any(one.score is not None for one in trials):
                    with reporting("write", self.journal.path):
                        self.journal.append(one.as_dict() for one in unwritten)
                    unwritten = []
            if all(one.score is None for one in trials):
                raise MergecoreError(
                    f"no candidate of generation {generation} could be merged and scored; the last one: {trial.error}"
                )
            strategy.tell(trials)

    def merge_best(self, resume: bool) -> MergeResult:
        """The best candidate as the output."""
        best = self.best
        assert best is not None
        found = ", ".join(f"{path} = {value!r}" for path, value in best.values.items())
        log.info("best of %d candidates: %s, score %r", len(self.trials), found, best.score)
        evolved = Evolved(self.spec, self.identity, self.trials, best)
        done = self._cost()
        show = self._shown(self._total(self.evolve.generations, 0))
        result = self.run(filled(self.spec, best.values), self.out, resume=resume, progress=show, evolved=evolved)
        return replace(result.after(done), seconds=time.monotonic() - self.started)

    def clear(self, *, keep_candidate: bool) -> None:
        """Removes all but the journal. `keep_candidate`: candidates that are merged, or partly, stay, too."""
        with suppress(OSError):
            names = self.folder.inside.names()
            kept = [name for name in names if name.lstrip(".").startswith("candidate")] if keep_candidate else []
            self.folder.inside.remove(set(names) - {self.journal.path.name, *kept})

    def _folder(self, number: int) -> Path:
        return self.folder.folder / f"candidate-{number}"

    def _check_inputs(self) -> None:
        for merge in self.merges:
            for model in merge.inputs:
                model.check_unchanged()

    def _merge_ahead(self, generation: int, number: int, asked: Sequence[dict[str, float]]) -> None:
        """Merges the candidates from `number` on that the disk has room for, if that is more than one: as many as are
        `asked` for. Where it does not work they are merged one by one, which tells whose fault it is."""
        (*earlier, planned), folder = self.merges, self.folder.inside
        free = shutil.disk_usage(folder.descriptor).free
        room = free // max(1, planned.bytes_to_write) - 1  # journals and small files need a little, too
        count = min(len(asked), MOST_TOGETHER, room)
        if count < 2 or earlier or planned.data or number <= self.alone_to:
            return
        self._check_inputs()
        merges = [(filled(self.spec, values), self._folder(n)) for n, values in enumerate(asked[:count], number)]
        try:
            left = [(spec, path) for spec, path in merges if not self._is_merged(spec, path)]
            if left:
                show = self._shown(self._total(generation, number))
                self.read += self.run_together(left, show)
        except FATAL:
            raise
        except MergecoreError as error:
            log.info("candidates of generation %d are merged one by one: %s", generation, error)
            self.clear(keep_candidate=False)
            self.alone_to = number + count - 1
        else:
            self.merged = list(range(number, number + count))

    def _is_merged(self, spec: MergeSpec, path: Path) -> bool:
        """Whether an attempt that was interrupted has merged this candidate; what else lies there is removed."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            folder = self.folder.inside.enter(path.name)
            try:
                with os.fdopen(folder.open(MANIFEST_NAME, os.O_RDONLY), "rb") as file:
                    if json.load(file)["spec"] == spec.as_dict():
                        return True
            finally:
                folder.close()
        self.folder.inside.remove([path.name])
        return False

    def _try(self, generation: int, number: int, values: dict[str, float]) -> Trial:
        """Scores one candidate, and merges it if it is not merged yet."""
        self.reported = -math.inf
        self._tick(generation, number)
        self._check_inputs()
        total, candidate = self._total(generation, number), self._folder(number)
        try:
            if number not in self.merged:
                self.folder.inside.remove([candidate.name])  # of an attempt that died while it was scored
                self.run(filled(self.spec, values), candidate, resume=True, progress=self._shown(total))
                self.merged, self.read = [number], self.read + self.one.bytes_read_total
            score = self.scorer(candidate, partial(self._tick, generation, number))
            trial = Trial(generation, number, values, score)
        except FATAL:
            raise
        except MergecoreError as error:
            log.warning("candidate %d of generation %d failed: %s", number, generation, error)
            trial = Trial(generation, number, values, None, " ".join(str(error).split()))
        self.merged = [other for other in self.merged if other != number]
        self.folder.inside.remove([name for name in self.folder.inside.names() if self._is_of(name, number)])
        return trial

    @staticmethod
    def _is_of(name: str, number: int) -> bool:
        """Whether an entry of the folder belongs to this candidate."""
        return name in (f"candidate-{number}", f".candidate-{number}.partial", f".candidate-{number}.stages")

    def _cost(self) -> MergeResult:
        """What the candidates cost that are merged so far."""
        merges, seconds = len(self.trials) + len(self.merged), time.monotonic() - self.started
        return MergeResult(
            output=self.out,
            method=self.merges[-1].method.name,
            tensors=merges * self.one.tensors_total,
            bytes_read=self.read,
            bytes_written=merges * self.one.bytes_written_total,
            seconds=seconds,
            peak_rss=0,
            resumed=False,
            warnings=(),
        )

    def _total(self, generation: int, number: int) -> Progress:
        """Nothing done of all merges of the search; `number` is the candidate at work, 0 for the last merge."""
        candidates, best = self.evolve.candidates, self.best
        merges, done = self.evolve.generations * candidates + 1, len(self.trials) + len(self.merged)
        return replace(
            self.one,
            tensors_total=merges * self.one.tensors_total,
            bytes_read_total=self.read + (merges - done) * self.one.bytes_read_total,
            bytes_written_total=merges * self.one.bytes_written_total,
            search=SearchProgress(
                generation, self.evolve.generations, number, candidates, best.score if best is not None else None
            ),
        )

    def _shown(self, total: Progress) -> Show | None:
        """Reports the progress of one merge as that of the search."""
        if self.report is None:
            return None
        report, done = self.report, self._cost()
        return lambda now: report(now.after(done, total))

    def _tick(self, generation: int, number: int) -> None:
        """While a candidate is scored: raises Interrupted if it shall stop, and reports now and then that it lives."""
        if self.should_stop is not None and self.should_stop():
            raise Interrupted("stopped on request; the scores so far are kept, --resume continues")
        if self.report is not None and time.monotonic() >= self.reported + REPORT_INTERVAL:
            self.reported = time.monotonic()
            self.report(self.one.after(self._cost(), self._total(generation, number)))


class _Strategy:
    """CMA-ES (N. Hansen, arXiv:1604.00772; his library `cma`) on the unit cube of all ranges. Raises SpecError, and
    MergecoreError if the library is missing.

    Only ranks are told: scores of any size and failures do. Its random numbers are its own.
    """

    def __init__(self, spec: MergeSpec) -> None:
        try:
            import cma
        except ImportError:
            raise MergecoreError("a search needs the library cma: pip install 'mergecore[evolve]'") from None
        from numpy.random import RandomState

        assert spec.evolve is not None
        self._ranges, self._sign = spec.evolve.parameters, _sign(spec)
        start = []
        for path, (low, high) in self._ranges.items():
            value = written(spec, path)
            start.append(0.5 if value is None or not low <= value <= high else (value - low) / (high - low))
        options: dict[str, Any] = {
            "bounds": [0, 1],
            "popsize": spec.evolve.candidates,
            "randn": RandomState(spec.evolve.seed).randn,
            "seed": math.nan,  # the library's word for: leave NumPy's own generator alone
            "verbose": -9,
        }
        if len(start) == 1:
            options["maxstd_boundrange"] = math.inf  # cma 4.5 fails where a single parameter reaches this limit
        self._strategy = cma.CMAEvolutionStrategy(start, spec.evolve.sigma, options)
        self._asked: list[Any] = []

    def ask(self) -> list[dict[str, float]]:
        """The candidates of the next generation, with nine digits: the last bits differ between processors."""
        self._asked = self._strategy.ask()
        return [
            {
                path: min(high, max(low, float(f"{low + float(x) * (high - low):.9g}")))
                for x, (path, (low, high)) in zip(point, self._ranges.items(), strict=True)
            }
            for point in self._asked
        ]

    def tell(self, trials: Sequence[Trial]) -> None:
        """The trials of the candidates asked for; of another machine's search they may lie at other places."""
        points = [self._point(asked, trial) for asked, trial in zip(self._asked, trials, strict=True)]
        costs = [math.inf if trial.score is None else self._sign * trial.score for trial in trials]
        self._strategy.tell(points, [float(sum(other < mine for other in costs)) for mine in costs])

    def _point(self, asked: Any, trial: Trial) -> Any:
        places = [(trial.values[path] - low) / (high - low) for path, (low, high) in self._ranges.items()]
        near = all(math.isclose(x, place, abs_tol=1e-6) for x, place in zip(asked, places, strict=True))
        return asked if near else places


def _sign(spec: MergeSpec) -> float:
    """-1 if higher scores are better."""
    return -1.0 if spec.evolve is not None and spec.evolve.score.direction == "maximise" else 1.0
