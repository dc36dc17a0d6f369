"""What a search for parameters has found: the trials, and the files beside the model (evolve.json, .csv, .svg).

Not for searching: evolve.py does that.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mergecore.spec import MergeSpec


@dataclass(frozen=True)
class Trial:
    """One candidate of a search; both numbers count from 1. A candidate that failed has no score, but an error."""

    generation: int
    candidate: int
    values: Mapping[str, float]
    score: float | None
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Evolved:
    """A finished search: the spec that asked for it, all trials in order, and the best of them."""

    spec: MergeSpec
    search: str
    """Identity of the search: spec, inputs, texts and versions."""
    trials: Sequence[Trial]
    best: Trial

    def as_dict(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "spec": self.spec.as_dict(),
            "spec_text": self.spec.text,
            "parameters": dict(self.best.values),
            "score": self.best.score,
            "search": self.search,
        }

    def files(self) -> dict[str, bytes]:
        """The files beside the model, by name; the plot only if matplotlib is installed."""
        what = {
            "parameters": dict(self.best.values),
            "score": self.best.score,
            "generation": self.best.generation,
            "candidate": self.best.candidate,
            "trials": [trial.as_dict() for trial in self.trials],
        }
        files = {"evolve.json": (json.dumps(what, indent=2) + "\n").encode(), "evolve.csv": self._table()}
        plot = self._plot()
        return files if plot is None else {**files, "evolve.svg": plot}

    def card(self) -> str:
        """The paragraph of the model card."""
        rows = "\n".join(f"| `{path}` | {value!r} |" for path, value in self.best.values.items())
        return (
            f"Found by evolution (CMA-ES) among {len(self.trials)} candidates, score {self.best.score!r}; "
            f"evolve.csv has them all.\n\n| parameter | value |\n|---|---|\n{rows}\n\n"
        )

    def _table(self) -> bytes:
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["generation", "candidate", "score", *self.best.values, "error"])
        for one in self.trials:
            score = "" if one.score is None else repr(one.score)
            table.writerow([one.generation, one.candidate, score, *map(repr, one.values.values()), one.error])
        return text.getvalue().encode(errors="replace")

    def _plot(self) -> bytes | None:
        """Scores and parameters by trial, as SVG."""
        try:
            import matplotlib
            from matplotlib.figure import Figure
        except ImportError:
            return None
        drawn = [(number, one) for number, one in enumerate(self.trials, 1) if one.score is not None]
        numbers = [number for number, _ in drawn]
        with matplotlib.rc_context({"svg.hashsalt": "mergecore", "text.parse_math": False}):
            figure = Figure(figsize=(8, 6), layout="constrained")
            above, below = figure.subplots(2, 1, sharex=True)
            above.plot(numbers, [one.score for _, one in drawn], ".")
            above.plot([self.trials.index(self.best) + 1], [self.best.score], "*", markersize=12)
            above.set_ylabel("score")
            for path in self.best.values:
                below.plot(numbers, [one.values[path] for _, one in drawn], ".", label=path)
            below.set(xlabel="candidate", ylabel="parameter")
            if len(self.best.values) <= 10:
                below.legend(fontsize="small")
            picture = io.BytesIO()
            figure.savefig(picture, format="svg", metadata={"Date": None})
        return picture.getvalue()
