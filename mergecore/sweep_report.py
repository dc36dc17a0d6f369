"""What there is to tell of a sweep: the table of its points, manifest and card beside its models, its plan for people.

Not for planning or merging it (sweeping.py).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mergecore import __version__

if TYPE_CHECKING:
    from mergecore.progress import MergeResult
    from mergecore.sweeping import SweepPlan


def manifest(sweep: SweepPlan, result: MergeResult) -> dict[str, Any]:
    """The manifest of the folder; each model has one of its own."""
    return {
        "mergecore": __version__,
        "identity": sweep.identity(),
        "method": sweep.method,
        "spec": sweep.spec.as_dict(),
        "spec_text": sweep.spec.text,
        "points": [
            {
                "name": point.name,
                "method": point.plan.method.name,
                "values": dict(point.values),
                "identity": point.plan.identity(),
                "bytes": point.plan.bytes_to_write,
            }
            for point in sweep.points
        ],
        "result": {key: value for key, value in result.as_dict().items() if key != "output"},
    }


def card(sweep: SweepPlan) -> str:
    """The README of the folder."""
    return (
        f"# A sweep of {len(sweep.points)} merges\n\nMade with mergecore {__version__}. Each folder is a model.\n\n"
        f"{table(sweep)}\n\n```yaml\n{sweep.spec.text.strip()}\n```\n"
    )


def table(sweep: SweepPlan) -> str:
    """The points as a table in Markdown."""
    paths = list(dict.fromkeys(path for point in sweep.points for path in point.values if path != "merge_method"))
    rows = [["point", "method", *paths], ["---"] * (2 + len(paths))]
    for point in sweep.points:
        values = [json.dumps(point.values[path]) if path in point.values else "" for path in paths]
        rows.append([point.name, point.plan.method.name, *values])
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def groups(sweep: SweepPlan) -> list[list[str]]:
    """Names of points that read together: each group shares windows of at least one tensor that is merged."""
    found: list[set[int]] = []
    for batch in sweep.batches:
        numbers = {number for number, job in batch.jobs if job.merges}
        touched = [group for group in found if group & numbers]
        found = [group for group in found if not group & numbers]
        if numbers:
            found.append(numbers.union(*touched))
    return [[sweep.points[number].name for number in sorted(group)] for group in sorted(found, key=min)]


def facts(sweep: SweepPlan) -> dict[str, Any]:
    """The plan as JSON values."""
    inputs = dict.fromkeys(model for point in sweep.points for model in point.plan.inputs)
    return {
        "method": sweep.method,
        "models": [str(model.path) for model in inputs],
        "tensors": len(sweep.jobs),
        "bytes_read": sweep.bytes_to_read,
        "bytes_read_alone": sum(point.plan.bytes_to_read for point in sweep.points),
        "bytes_written": sweep.bytes_to_write,
        "memory_held": sweep.held_bytes,
        "groups": groups(sweep),
        "warnings": list(sweep.warnings),
        "earlier": [
            {"name": path.name, "bytes_read": merge.bytes_to_read, "bytes_written": merge.bytes_to_write}
            for path, merge in sweep.earlier
        ],
        "points": [
            {
                "name": point.name,
                "method": point.plan.method.name,
                "values": dict(point.values),
                "bytes_written": point.plan.bytes_to_write,
            }
            for point in sweep.points
        ],
    }


def lines(sweep: SweepPlan) -> list[str]:
    """The plan for people."""
    told = facts(sweep)
    size = {key: f"{told[key] / 1e9:.3f} GB" for key in ("bytes_read", "bytes_read_alone", "bytes_written")}
    return [
        *(f"before    {merge['name']}: write {merge['bytes_written'] / 1e9:.3f} GB" for merge in told["earlier"]),
        f"sweep     {len(sweep.points)} points of {len(told['models'])} inputs",
        *(f"point     {point['name']} by {point['method']}" for point in told["points"]),
        f"read      {size['bytes_read']}; one by one it would be {size['bytes_read_alone']}",
        *(f"together  {', '.join(group)}" for group in told["groups"]),
        f"write     {size['bytes_written']}: so much disk space must be free",
        f"hold      {told['memory_held'] / 2**20:.0f} MiB beside the process itself",
        *(f"warning   {warning}" for warning in told["warnings"]),
    ]
