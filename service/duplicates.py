"""The same spec on the same inputs is run once: what identifies a job, and which other job did or does the same.

Runs in the worker before torch is loaded; no weights are read.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from mergecore import __version__
from mergecore.references import parse_reference
from service.errors import ServiceError
from service.fingerprints import remembered
from service.spool import Spool
from service.status import JobStatus

if TYPE_CHECKING:
    from mergecore.spec import MergeSpec

MANIFEST = "mergecore_manifest.json"
"""Only a complete output has it."""

UNLIKE_ANY = "none"
"""The fingerprint of a job that is run whatever others did."""


def fingerprint(spec: MergeSpec, resolve: Callable[[str, str | None], Path]) -> str:
    """What decides the result and its place: the spec, run.output and run.shard_size, the models' files, our version.

    A file counts by name, size and mtime. A spec whose candidates a command scores is UNLIKE_ANY: who knows what the
    command does. Raises SpecError, CheckpointError and OSError for models that are not there.
    """
    if spec.evolve is not None and spec.evolve.score.command is not None:
        return UNLIKE_ANY
    merges = [*spec.earlier, spec]
    results = {merge.name for merge in spec.earlier}
    models: dict[str, list[tuple[str, int, int]]] = {}
    for merge in merges:
        for text, _ in merge.references():
            name, _, adapter = text.partition("+")
            places: list[tuple[str, str | None]]
            if name in results:
                places = [(adapter, None)] if adapter else []
            else:
                reference = parse_reference(text, spec.directory)
                places = [(reference.path, reference.revision), *([reference.lora] if reference.lora else [])]
            for place in places:
                path = resolve(*place)
                models[str(path)] = _files(path)
        for data, _ in merge.data():
            path = resolve(data, None)
            models[str(path)] = _files(path)
    identities = [merge.identity() for merge in merges]
    what = [__version__, identities, spec.run.output, spec.run.shard_size, sorted(models.items())]
    return str(xxhash.xxh3_128_hexdigest(json.dumps(what).encode()))


def done_before(spool: Spool, wanted: str) -> JobStatus | None:
    """The last job in done/ with this fingerprint, if its output is still there."""
    status = remembered(spool.root, wanted)
    return status if status is not None and (Path(status.output) / MANIFEST).is_file() else None


def running_before(spool: Spool, own: JobStatus) -> JobStatus | None:
    """An older job that somebody runs now, with the fingerprint of `own` or with none yet: it has only just begun."""
    older = [
        one
        for one in spool.running_jobs()
        if one.fingerprint in ("", own.fingerprint)
        and one.state == "running"
        and (one.created, one.job) < (own.created, own.job)
    ]
    return min(older, key=lambda one: (one.created, one.job), default=None)


def forced(text: str) -> str:
    """A spec's text with run.force set, and nothing else changed. Raises ServiceError if it is no mapping."""
    import yaml

    from mergecore.spec.yaml_lines import read_yaml

    first = read_yaml(text)[0]  # it bounds size and depth, which PyYAML does not
    if first.value is None:
        raise ServiceError(f"cannot set run.force: {first.problems[0].message}")
    try:
        documents = [node for node in yaml.compose_all(text, yaml.SafeLoader) if node is not None]
    except (yaml.YAMLError, RecursionError) as error:
        raise ServiceError(f"cannot set run.force: not valid YAML: {' '.join(str(error).split())}") from error
    for node in reversed(documents):  # from the end, so that places before it stay
        start, end, new = _change(node)
        text = text[:start] + new + text[end:]
    return text


def _change(document: Any) -> tuple[int, int, str]:
    """Which characters become which others, so that the document says run.force."""
    run = _value(document, "run", "the spec")
    if run is None:
        return _inserted(document, '"run": {"force": true}')
    if run.tag.endswith(":null"):
        return run.start_mark.index, run.end_mark.index, ' {"force": true}'
    force = _value(run, "force", "run")
    if force is None:
        return _inserted(run, '"force": true')
    return force.start_mark.index, force.end_mark.index, "true"


def _inserted(mapping: Any, item: str) -> tuple[int, int, str]:
    at = mapping.start_mark
    if mapping.flow_style:
        return at.index + 1, at.index + 1, item + (", " if mapping.value else "")
    return at.index, at.index, f"{item}\n{' ' * at.column}"


def _value(mapping: Any, key: str, what: str) -> Any:
    if not isinstance(mapping.value, list) or not mapping.id == "mapping":
        raise ServiceError(f"cannot set run.force: {what} is no mapping (line {mapping.start_mark.line + 1})")
    return next((value for name, value in mapping.value if name.value == key), None)


def _files(path: Path) -> list[tuple[str, int, int]]:
    entries = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [(entry.name, entry.stat()) for entry in entries if os.access(entry, os.F_OK)]
    return [(name, one.st_size, one.st_mtime_ns) for name, one in found if stat.S_ISREG(one.st_mode)]
