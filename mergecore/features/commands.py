"""Commands of the command line that run models: what they print and draw."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from mergecore.device import open_device
from mergecore.errors import SpecError
from mergecore.features.linearity import Measured, linearity


def linearity_command(options: argparse.Namespace) -> int:
    """`mergecore linearity`: a table, JSON, and a plot."""
    if len(options.data) != len(options.models):
        raise SpecError(f"{len(options.models)} models and {len(options.data)} --data; expected one for each model")
    if options.plot is not None:
        _pyplot()  # before the work
    found = linearity(
        options.base,
        options.models,
        options.data,
        level=options.level,
        samples=options.samples,
        length=options.length,
        field=options.field,
        dtype=options.dtype,
        seed=options.seed,
        device=open_device(options.device).torch_device,
        tell=lambda done, total, what: logging.info("%d of %d %s", done, total, what),
    )
    names = [Path(model).name or model for model in options.models]
    if options.plot is not None:
        _draw(found, names, options.plot)
    if options.json:
        print(json.dumps({"models": names, "modules": [one.as_dict() for one in found]}, indent=2))
    else:
        _show(found, names)
    return 0


def _show(found: Sequence[Measured], names: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="less is more linear, but for the cosines")
    table.add_column("module")
    for name in names:
        table.add_column(f"non-linearity\n{name}", justify="right")
    for title in ("projection\ndistance", "cosine\nof merges", "cosine\nbetween models"):
        table.add_column(title, justify="right")
    for kind in dict.fromkeys(_kind(one.module) for one in found):
        group = [one for one in found if _kind(one.module) == kind]
        for one in group:
            table.add_row(one.module, *_cells(one))
        if len(group) > 1:
            columns = list(zip(*map(_numbers, group), strict=True))
            table.add_row(f"all {kind}", *(_mean_and_deviation(column) for column in columns), style="bold")
    Console(width=None if Console().is_terminal else 160).print(table)


def _kind(module: str) -> str:
    """What stands behind the layer's number: attn, mlp, head, layer; or model."""
    parts = module.split(".")
    return parts[2] if len(parts) > 2 else module


def _numbers(one: Measured) -> list[float | None]:
    return [*one.nonlinearity, one.projection_distance, one.cosine, one.cosine_between_models]


def _cells(one: Measured) -> list[str]:
    return ["" if number is None else f"{number:.4g}" for number in _numbers(one)]


def _mean_and_deviation(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = math.fsum(known) / len(known)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / len(known))
    return f"{mean:.4g} ± {deviation:.2g}"


def _pyplot():  # type: ignore[no-untyped-def]
    try:
        import matplotlib
    except ImportError as error:
        raise SpecError(f"{error}; --plot needs: pip install mergecore[plot]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw(found: Sequence[Measured], names: Sequence[str], path: Path) -> None:
    """One panel a measure, one line a kind of submodule (and model), over the layers."""
    pyplot = _pyplot()
    kinds = list(dict.fromkeys(_kind(one.module) for one in found))
    figure, (scores, distances) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for kind in kinds:
        group = [one for one in found if _kind(one.module) == kind]
        for number, name in enumerate(names):
            scores.plot([one.nonlinearity[number] for one in group], marker=".", label=f"{kind}, {name}")
        if group[0].projection_distance is not None:
            distances.plot([one.projection_distance for one in group], marker=".", label=kind)
    scores.set(title="Non-linearity Score", xlabel="submodule, from the first layer", ylabel="score", yscale="log")
    distances.set(title="Projection distance of merges", xlabel="submodule, from the first layer")
    for axes in (scores, distances):
        if axes.get_lines():
            axes.legend(fontsize="small")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
