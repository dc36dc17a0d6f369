"""What `mergecore plan` tells of a merge: as JSON values, and for people. Of a sweep: sweep_report.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergecore import estimate
from mergecore.planning import MergePlan
from mergecore.sizes import told_size
from mergecore.spec.evolve import Evolve


def facts(planned: MergePlan, evolve: Evolve | None) -> dict[str, Any]:
    """The plan as JSON values; `evolve`: the search of which it is one candidate."""
    told: dict[str, Any] = {
        "method": planned.method.name,
        "models": [str(model.path) for model in planned.models],
        "base": str(planned.base.path) if planned.base is not None else None,
        "tensors": len(planned.jobs),
        "passes": planned.passes,
        "bytes_read": planned.bytes_to_read,
        "bytes_written": planned.bytes_to_write,
        "memory_held": planned.held_bytes,
        "shards": [shard.filename for shard in planned.layout.shards],
        "compute_seconds": round(estimate.seconds(planned), 3),
        "warnings": list(planned.warnings),
        "candidates": evolve.generations * evolve.candidates if evolve is not None else 0,
        "earlier": [
            {
                "name": path.name,
                "method": merge.method.name,
                "bytes_read": merge.bytes_to_read,
                "bytes_written": merge.bytes_to_write,
                "warnings": list(merge.warnings),
            }
            for path, merge in planned.earlier
        ],
        "jobs": _jobs(planned),
    }
    if planned.data:
        from mergecore.features.fitting import held_bytes, kept_bytes

        told["fit_bytes"] = kept_bytes(planned)
        told["memory_held"] = max(planned.held_bytes, held_bytes(planned))
    return told


def _jobs(planned: MergePlan) -> list[dict[str, Any]]:
    return [
        {
            "name": job.name,
            "shape": list(job.shape),
            "dtype": job.dtype,
            "action": "merge" if job.parameters is not None else "copy",
            "orientation": job.orientation,
            "matrices": job.matrices,
            "window_rows": job.window_rows,
            "parameters": dict(job.parameters) if job.parameters is not None else None,
        }
        for job in planned.jobs
    ]


def lines(told: Mapping[str, Any], evolve: Evolve | None) -> list[str]:
    """What `facts` tells, for people."""
    base = f", base {told['base']}" if told["base"] else ""
    found = []
    if evolve is not None:
        found.append(f"search    {evolve.generations} generations of {evolve.candidates} candidates; one merge is:")
    for merge in told["earlier"]:
        read, written = told_size(merge["bytes_read"]), told_size(merge["bytes_written"])
        found.append(f"before    {merge['name']} by {merge['method']}: read {read}, write {written}")
    found += [
        f"method    {told['method']}, {len(told['models'])} models{base}",
        f"read      {told_size(told['bytes_read'])} in {told['passes']} pass(es) over {told['tensors']} tensors",
        f"write     {told_size(told['bytes_written'])} in {len(told['shards'])} file(s)",
        f"hold      {told['memory_held'] / 2**20:.0f} MiB beside the process itself",
    ]
    for what, nbytes in told.get("fit_bytes", {}).items():
        where = "" if what.endswith("in memory") else "; beyond --memory in a file beside the output"
        found.append(f"fit       {told_size(nbytes)} of {what} at most{where}")
    found.append(
        f"compute   {told['compute_seconds']:.1f} s at the speed of this machine's memory; slow disks come on top"
    )
    return [*found, *(f"warning   {warning}" for warning in told["warnings"])]
