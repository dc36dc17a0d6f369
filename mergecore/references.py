"""Which model a spec names: mergekit's `model@revision+lora@revision`, found on this machine and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergecore.errors import CheckpointError, SpecError


@dataclass(frozen=True)
class ModelReference:
    """A model, and perhaps a LoRA adapter on it, as a spec names them: local paths or names on the Hugging Face hub."""

    path: str
    revision: str | None = None
    lora: tuple[str, str | None] | None = None
    """(path, revision) of the adapter."""
    override_architecture: str | None = None
    """The class that config.json shall name, in place of its own."""

    def __str__(self) -> str:
        """In the short form, without `override_architecture`."""
        parts = [(self.path, self.revision), *([self.lora] if self.lora is not None else [])]
        return "+".join(path if revision is None else f"{path}@{revision}" for path, revision in parts)


def parse_reference(value: str | Mapping[str, Any], directory: Path | None = None) -> ModelReference:
    """A reference in the short form, or in the long one of mappings.

    Short: `model`, `model@revision`, `model+lora`, `model@revision+lora@revision`; where a path exists (relative to
    `directory`) that has these signs in its name, they belong to the name. Long: {model: {path, revision},
    lora: {path, revision}, override_architecture}, model and lora also as text. SpecError says what is wrong.
    """
    directory = directory or Path()
    if isinstance(value, str):
        return _parse_text(value, directory)
    if not isinstance(value, Mapping):
        raise SpecError(f"{value!r} names no model: expected text or a mapping with `model`")
    _check_keys(value, {"model", "lora", "override_architecture"})
    if value.get("model") is None:
        raise SpecError(f"{dict(value)} names no model: `model` is missing")
    model, lora = _parse_path(value["model"], directory), value.get("lora")
    architecture = value.get("override_architecture")
    if not isinstance(architecture, str | None):
        raise SpecError(f"override_architecture must be the name of a class, found {architecture!r}")
    return ModelReference(*model, None if lora is None else _parse_path(lora, directory), architecture)


def local_folder(path: str, revision: str | None = None, directory: Path | None = None) -> Path:
    """Where a model or adapter lies: an existing path (relative to `directory`, ~ for the home folder), or the
    snapshot of a hub model `organisation/name` in the local Hugging Face cache (HF_HOME, HF_HUB_CACHE).

    No network is used. CheckpointError says what was looked for where, and how to get it.
    """
    local = _existing(path, directory or Path())
    if local is not None:
        if revision is not None:
            raise CheckpointError(f"{local} is a local path, which has no revisions; leave out @{revision}")
        return local
    return _cached(path, revision, directory or Path())


def _parse_text(text: str, directory: Path) -> ModelReference:
    if _existing(text, directory) is not None:
        return ModelReference(text)
    # The plus that divides may stand among others that belong to a name: where a part exists, the name is whole.
    plus = [at for at, sign in enumerate(text) if sign == "+"]
    whole = [at for at in plus if all(_is_one_path(part, directory) for part in (text[:at], text[at + 1 :]))]
    if not plus:
        return ModelReference(*_parse_path(text, directory))
    if not whole:
        raise SpecError(f"{text!r} has several +; a model takes one adapter: model+lora")
    model, lora = text[: whole[0]], text[whole[0] + 1 :]
    return ModelReference(*_parse_path(model, directory), _parse_path(lora, directory))


def _is_one_path(text: str, directory: Path) -> bool:
    return "+" not in text or any(_existing(part, directory) for part in (text, text.rpartition("@")[0]))


def _parse_path(value: Any, directory: Path) -> tuple[str, str | None]:
    """(path, revision) of `path@revision` or {path, revision}."""
    if isinstance(value, Mapping):
        _check_keys(value, {"path", "revision"})
        path, revision = value.get("path"), value.get("revision")
    elif isinstance(value, str) and _existing(value, directory) is None and "@" in value:
        path, _, revision = value.partition("@")
        if not revision or "@" in revision:
            raise SpecError(f"{value!r} is no model: expected one @ with a revision after it")
    else:
        path, revision = value, None
    if not isinstance(path, str) or not path or not isinstance(revision, str | None):
        raise SpecError(f"{value!r} names no model: expected a path, or {{path, revision}}, as text")
    return path, revision


def _check_keys(value: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(map(str, value)) - known)
    if unknown:
        raise SpecError(f"{', '.join(unknown)} is not a key of a model; known are {', '.join(sorted(known))}")


def _existing(path: str, directory: Path) -> Path | None:
    try:
        found = directory / Path(path).expanduser()
        return found if path and found.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, no home
        return None


def _cached(name: str, revision: str | None, directory: Path) -> Path:
    """The snapshot of a hub model, by the references and folders of the cache alone."""
    absent = f"{name} does not exist"
    if not Path(name).is_absolute():
        absent += f" (looked for {(directory / name).absolute()})"
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise CheckpointError(absent)

    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except HFValidationError:
        raise CheckpointError(f"{absent}, and the name cannot be one of a hub") from None
    except OSError as error:
        incomplete = getattr(error, "snapshot_path", None)  # without a README, say; what matters is checked at opening
        if incomplete is not None:
            return Path(incomplete)
        at, option = ("", "") if revision is None else (f" at revision {revision}", f" --revision {revision}")
        raise CheckpointError(
            f"{absent}, and the Hugging Face cache {constants.HF_HUB_CACHE} does not hold it{at}; nothing is "
            f"downloaded here: run `hf download {name}{option}`, or give the path of a folder"
        ) from None
