"""References to models: mergekit's syntax, local paths, and the Hugging Face cache of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergecore.errors import CheckpointError, SpecError
from mergecore.references import ModelReference, local_folder, parse_reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# ---- the syntax


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ModelReference("org/name")),
        ("org/name@main", ModelReference("org/name", "main")),
        ("org/name@refs/pr/1", ModelReference("org/name", "refs/pr/1")),
        ("org/name+org/lora", ModelReference("org/name", None, ("org/lora", None))),
        ("org/name@a+org/lora@b", ModelReference("org/name", "a", ("org/lora", "b"))),
        ("/models/a+./lora", ModelReference("/models/a", None, ("./lora", None))),
    ],
)
def test_the_short_form(text: str, expected: ModelReference) -> None:
    assert parse_reference(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"model": {"path": "a"}}, ModelReference("a")),
        ({"model": "a@r", "lora": "b@s"}, ModelReference("a", "r", ("b", "s"))),
        (
            {"model": {"path": "a", "revision": "r"}, "lora": {"path": "b", "revision": None}},
            ModelReference("a", "r", ("b", None)),
        ),
        (
            {"model": "a", "lora": None, "override_architecture": "LlamaForCausalLM"},
            ModelReference("a", override_architecture="LlamaForCausalLM"),
        ),
    ],
)
def test_the_long_form(value: Any, expected: ModelReference) -> None:
    assert parse_reference(value) == expected


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "names no model"),
        ("a+b+c", r"several \+"),
        ("a+", "names no model"),
        ("+b", "names no model"),
        ("a@", "a revision after it"),
        ("a@b@c", "a revision after it"),
        ("@r", "names no model"),
        (7, "names no model"),
        ({}, "`model` is missing"),
        ({"lora": "b"}, "`model` is missing"),
        ({"model": 7}, "names no model"),
        ({"model": {"revision": "r"}}, "names no model"),
        ({"model": {"path": "a", "revision": 7}}, "names no model"),
        ({"model": {"path": "a", "rev": "r"}}, "rev is not a key"),
        (
            {"model": "a", "adapter": "b"},
            "adapter is not a key of a model; known are lora, model, override_architecture",
        ),
        ({"model": "a", "override_architecture": 1}, "override_architecture must be"),
    ],
)
def test_what_names_no_model_is_an_error(value: Any, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        parse_reference(value)


PARTS = st.text("ab/.-_", min_size=1, max_size=6)


@given(PARTS, st.none() | PARTS, st.none() | st.tuples(PARTS, st.none() | PARTS))
def test_what_is_written_is_parsed_back(path: str, revision: str | None, lora: tuple[str, str | None] | None) -> None:
    reference = ModelReference(path, revision, lora)
    assert parse_reference(str(reference), Path("/no/such/folder")) == reference


def test_signs_in_the_name_of_an_existing_path_belong_to_it(tmp_path: Path) -> None:
    for name in ("a+b", "v1@final", "x+y@z"):
        (tmp_path / name).mkdir()
    expected = {
        "a+b": ModelReference("a+b"),
        "v1@final": ModelReference("v1@final"),
        "x+y@z": ModelReference("x+y@z"),
        "a+b+lora": ModelReference("a+b", None, ("lora", None)),
        "model+a+b": ModelReference("model", None, ("a+b", None)),
        "v1@final+lora@r": ModelReference("v1@final", None, ("lora", "r")),
        f"{tmp_path}/a+b+{tmp_path}/x+y@z": ModelReference(f"{tmp_path}/a+b", None, (f"{tmp_path}/x+y@z", None)),
    }
    for text, reference in expected.items():
        assert parse_reference(text, tmp_path) == reference
    assert parse_reference("a+b", Path("/")) == ModelReference("a", None, ("b", None))


# ---- where it lies


def hub_cache(folder: Path, name: str, *, ref: str | None = "main") -> Path:
    """A snapshot as huggingface_hub keeps it: a blob, a link to it, and a reference to the commit."""
    repository = folder / ("models--" + name.replace("/", "--"))
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    if ref is not None:
        (repository / "refs").mkdir()
        (repository / "refs" / ref).write_text(COMMIT)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; any use of the network is a failure."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    return tmp_path / "hub"


def test_existing_paths_come_first(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(cache, "org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert local_folder("org/name", None, tmp_path) == tmp_path / "org/name"
    assert local_folder(str(tmp_path / "org")) == tmp_path / "org"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_folder("~/org") == tmp_path / "org"
    with pytest.raises(CheckpointError, match="a local path, which has no revisions"):
        local_folder("org/name", "main", tmp_path)


def test_a_hub_name_is_found_in_the_cache(cache: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(cache, "org/name")
    bare = hub_cache(cache, "gpt2", ref="v2")
    for revision in (None, "main", COMMIT):
        assert local_folder("org/name", revision, tmp_path) == snapshot
    assert local_folder("gpt2", "v2", tmp_path) == bare
    assert (local_folder("org/name") / "config.json").read_text() == "{}"


def test_what_is_nowhere_says_what_was_looked_for_and_how_to_get_it(cache: Path, tmp_path: Path) -> None:
    hub_cache(cache, "org/name")
    with pytest.raises(
        CheckpointError,
        match=rf"looked for {tmp_path}/org/other\), and .*{cache} does not hold it; .*`hf download org/other`",
    ):
        local_folder("org/other", None, tmp_path)
    with pytest.raises(CheckpointError, match=r"at revision v9; .*`hf download org/name --revision v9`"):
        local_folder("org/name", "v9", tmp_path)
    with pytest.raises(CheckpointError, match=r"^/no/such/model does not exist$"):
        local_folder("/no/such/model")
    with pytest.raises(CheckpointError, match=rf"^\./model does not exist \(looked for {tmp_path}/model\)$"):
        local_folder("./model", None, tmp_path)
    with pytest.raises(CheckpointError, match="cannot be one of a hub"):
        local_folder("org/na me", None, tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        local_folder("a\0b", None, tmp_path)


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_environment_says_where_the_cache_is(tmp_path: Path, variable: str) -> None:
    snapshot = hub_cache(tmp_path / "hub", "org/name")
    code = "from mergecore.references import local_folder; print(local_folder('org/name'))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment[variable] = str(tmp_path if variable == "HF_HOME" else tmp_path / "hub")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(snapshot)


def test_references_and_local_paths_need_neither_torch_nor_the_hub(tmp_path: Path) -> None:
    code = (
        "import sys; from mergecore.references import *; parse_reference('a@b+c'); local_folder(sys.argv[1])\n"
        "sys.exit(bool({'torch', 'huggingface_hub'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
