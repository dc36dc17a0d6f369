"""No link, race or odd file makes the service read or write outside of its folders; the kernel is asked who did."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mergecore import load_spec, merge, plan
from mergecore.adapters import open_adapter
from mergecore.chat_template import folder_template
from mergecore.checkpoint import open_checkpoint, read_header
from mergecore.confined import OutputFolder, confined, names_in, open_input
from mergecore.errors import CheckpointError, MergecoreError, OutputError, OutputExistsError, SpecError
from mergecore.spec import MergeSpec
from mergecore.tokenizer import read_tokenizer
from service.worker import confinement, find_model, load, output_path
from tests.canary import Canary, guarded, swapping
from tests.models import LLAMA, llama, load_tensors, moved, write_model
from tests.test_service_models import write_adapter
from tests.vocabularies import save, words


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The models a and b with an adapter and a tokenizer; `outside` beside the root is like b, full of sevens."""
    root = tmp_path / "root"
    tensors = llama(hidden=16, vocabulary=24)
    config = {**LLAMA, "num_hidden_layers": 2}
    for i, name in enumerate(("a", "b")):
        write_model(root / name, moved(tensors, 1e-3, i), config)
        save(root / name, words("one", "two"))
    write_adapter(root / "adapter")
    write_model(tmp_path / "outside", {name: torch.full_like(value, 7) for name, value in tensors.items()}, config)
    save(tmp_path / "outside", words("one", "SECRET"))
    (tmp_path / "outside" / "tokenizer_config.json").write_text('{"chat_template": "SECRET"}')
    return root


def linear(*models: str, **keys: Any) -> MergeSpec:
    entries = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
    return load_spec({"merge_method": "linear", "models": entries, "dtype": "float32", **keys})


def serve(spec: MergeSpec, root: Path, outputs: Path) -> Path:
    """A merge as the worker confines it."""
    out = output_path(spec, "job", outputs)
    with confinement([root], outputs, out):
        return merge(spec, out, resume=True, resolve=partial(find_model, roots=[root])).output


# --- the canary


def test_the_canary_tells_of_reads_and_writes_and_of_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_text("x")
    canary = Canary(tmp_path / "in")
    assert names_in(tmp_path) == ["in"]
    os.close(os.open(tmp_path / "in" / "file", os.O_PATH))
    os.close(os.open(tmp_path / "in", os.O_RDONLY))
    assert canary.touched() == []
    for act in (
        lambda: (tmp_path / "in" / "file").read_text(),
        lambda: os.listdir(tmp_path / "in"),
        lambda: (tmp_path / "in" / "new").touch(),
        lambda: (tmp_path / "in" / "new").unlink(),
        lambda: os.mkdir(tmp_path / "in" / "folder"),
    ):
        act()
        assert canary.touched() != []
    canary.close()


# --- links that stand still


def test_links_that_stay_below_the_roots_are_followed_also_from_one_root_to_another(tmp_path: Path, root: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    os.rename(root / "b" / "model.safetensors", blobs / "0123")
    (root / "b" / "model.safetensors").symlink_to("../../blobs/0123")
    (root / "c").symlink_to("b")
    with confined([root, blobs], []):
        assert open_checkpoint(root / "c").tensors.keys() == open_checkpoint(root / "a").tensors.keys()
    with confined([root], []), pytest.raises(CheckpointError, match=r"model\.safetensors does not lie below a model"):
        open_checkpoint(root / "c")


READERS: dict[str, Callable[[Path], Any]] = {
    "model.safetensors": lambda folder: read_header(folder / "model.safetensors"),
    "config.json": open_checkpoint,
    "model.safetensors.index.json": open_checkpoint,
    "pytorch_model.bin": lambda folder: open_checkpoint(folder / "pytorch_model.bin"),
    "adapter_config.json": open_adapter,
    "adapter_model.safetensors": open_adapter,
    "tokenizer_config.json": read_tokenizer,
    "special_tokens_map.json": read_tokenizer,
    "chat_template.jinja": folder_template,
    "chat_template.json": folder_template,
}


@pytest.fixture
def folder(root: Path) -> Path:
    """A folder below the root which is a model and an adapter at once."""
    folder = root / "all"
    shutil.copytree(root / "a", folder)
    shutil.copytree(root / "adapter", folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("way", ["absolute", "relative", "hop"])
def test_no_file_of_a_model_is_read_through_a_link_that_leads_out(
    tmp_path: Path, root: Path, folder: Path, name: str, way: str
) -> None:
    secret = tmp_path / "outside" / "secret"
    secret.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b'{"chat_template": "SECRET"}')
    (folder / name).unlink(missing_ok=True)
    (root / "hop").symlink_to("../outside")
    links = {"absolute": str(secret), "relative": "../../outside/secret", "hop": "../hop/secret"}
    (folder / name).symlink_to(links[way])
    with (
        confined([root], []),
        guarded(tmp_path / "outside"),
        pytest.raises(CheckpointError, match="does not lie below"),
    ):
        READERS[name](folder)


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # such addresses are short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o020666, os.makedev(1, 5))  # /dev/zero: has no end
    except PermissionError:
        path.symlink_to("/dev/zero")


ODD: dict[str, Callable[[Path], None]] = {
    "fifo": lambda path: os.mkfifo(path),
    "socket": make_socket,
    "device": make_device,
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", [name for name in READERS if not name.startswith("chat")])
def test_what_is_no_plain_file_is_an_error_and_nothing_is_waited_for(
    root: Path, folder: Path, name: str, kind: str
) -> None:
    (folder / name).unlink(missing_ok=True)
    ODD[kind](folder / name)
    with confined([root], []), pytest.raises(CheckpointError):
        READERS[name](folder)


def test_a_path_that_is_no_path_is_an_os_error(root: Path) -> None:
    for name in ("a\0b", "\ud800", "x" * 5000):
        with pytest.raises(OSError):
            open_input(root / name)


# --- links that are swapped in while somebody looks


MOST_TRIES = 100_000


def race(attempt: Callable[[int], object], times: int) -> None:
    """Tries until the attacker was too late `times` times, and as often was there in time but got nothing by it."""
    won = lost = 0
    while min(won, lost) < times:
        assert won + lost < MOST_TRIES, f"{won} attempts went well, {lost} were refused"
        try:
            attempt(won + lost)
            won += 1
        except MergecoreError:
            lost += 1


@pytest.mark.parametrize("what", ["folder", "model.safetensors", "config.json", "tokenizer.json"])
def test_a_racing_attacker_never_has_a_model_outside_planned(tmp_path: Path, root: Path, what: str) -> None:
    inside, outside = root / "b", tmp_path / "outside"
    place, target = (inside, outside) if what == "folder" else (inside / what, outside / what)
    spec = linear("a", "b", tokenizer_source="b")
    with guarded(outside), swapping(place, target), confined([root], []):
        race(lambda number: plan(spec, resolve=partial(find_model, roots=[root])), 10)


@pytest.mark.parametrize("what", ["folder", "model.safetensors"])
def test_a_racing_attacker_never_has_a_model_outside_merged(tmp_path: Path, root: Path, what: str) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    expected = load_tensors(serve(linear("a", "b", run={"output": "right"}), root, outputs))
    inside, outside = root / "b", tmp_path / "outside"
    place, target = (inside, outside) if what == "folder" else (inside / what, outside / what)

    def attempt(number: int) -> None:
        found = load_tensors(serve(linear("a", "b", run={"output": f"{number}"}), root, outputs))
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    with guarded(outside), swapping(place, target):
        race(attempt, 10)


def test_a_racing_attacker_never_has_an_output_written_outside(tmp_path: Path, root: Path) -> None:
    outputs, outside = tmp_path / "outputs", tmp_path / "elsewhere"
    (outputs / "team").mkdir(parents=True)
    outside.mkdir()
    with guarded(outside), swapping(outputs / "team", outside):
        race(lambda number: serve(linear("a", "b", run={"output": f"team/deep/{number}"}), root, outputs), 15)
    assert list(outside.iterdir()) == []


# --- traps in the outputs folder


REMOVED = (".new.partial/output", ".new.stages/first")


@pytest.mark.parametrize("name", [".new.partial", ".new.stages", "new", "team", *REMOVED])
def test_a_link_in_the_place_of_an_output_is_not_followed(tmp_path: Path, root: Path, name: str) -> None:
    outputs, outside = tmp_path / "outputs", tmp_path / "elsewhere"
    outside.mkdir()
    (outputs / name).parent.mkdir(parents=True)
    (outputs / name).symlink_to(outside)
    first = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1.0}}
    last = {**first, "models": [{"model": "first"}, {"model": "b"}]}
    last["run"] = {"output": "team/new" if name == "team" else "new"}
    (tmp_path / "spec.yaml").write_text("\n---\n".join(map(json.dumps, ({"name": "first", **first}, last))))
    spec = load(tmp_path / "spec.yaml", "spec.yaml")
    with guarded(outside):
        if name in REMOVED:  # a trap in our own folder: it goes with what an earlier attempt left
            assert (serve(spec, root, outputs) / "model.safetensors").is_file()
        else:
            with pytest.raises((OutputError, OutputExistsError, SpecError)):
                serve(spec, root, outputs)


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", ["lock", "journal.jsonl", "output/model.safetensors", "output/config.json"])
def test_no_file_in_the_staging_folder_leads_to_another_one(
    tmp_path: Path, root: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    outputs, victim = tmp_path / "outputs", tmp_path / "victim"
    victim.write_text("precious")
    trap = outputs / ".new.partial" / name
    trap.parent.mkdir(parents=True)
    link(victim, trap)
    with suppress(OutputError):
        serve(linear("a", "b", run={"output": "new"}), root, outputs)
    assert victim.read_text() == "precious"


def test_an_interrupted_output_whose_file_was_replaced_by_a_hard_link_is_not_resumed_into_it(
    tmp_path: Path, root: Path
) -> None:
    outputs, victim = tmp_path / "outputs", tmp_path / "victim"
    outputs.mkdir()
    spec = linear("a", "b", run={"output": "new"})
    with pytest.raises(MergecoreError, match="stopped on request"), confined([root], [outputs]):
        merge(
            spec, output_path(spec, "job", outputs), resolve=partial(find_model, roots=[root]),
            should_stop=lambda: bool(list(outputs.glob(".new.partial/output/*"))),
        )  # fmt: skip
    shard = outputs / ".new.partial" / "output" / "model.safetensors"
    victim.write_bytes(bytes(shard.stat().st_size))
    shard.unlink()
    os.link(victim, shard)
    with pytest.raises(OutputError, match="hard links"):
        serve(spec, root, outputs)
    assert not any(victim.read_bytes())


def test_a_folder_that_was_opened_stays_the_one_that_is_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    with confined([], [tmp_path / "in"]):
        folder = OutputFolder.at(tmp_path / "in" / "a", [])
        os.rename(tmp_path / "in" / "a", tmp_path / "in" / "moved")
        (tmp_path / "in" / "a").symlink_to(outside)
        os.close(folder.open("file", os.O_WRONLY | os.O_CREAT))
        folder.close()
        with pytest.raises(OutputError, match="leads out of the outputs folder"):
            OutputFolder.at(tmp_path / "in" / "a", [])
    assert os.listdir(outside) == []
    assert os.listdir(tmp_path / "in" / "moved") == ["file"]


# --- specs


@pytest.mark.parametrize("kind", [*ODD, "link", "hard link"])
def test_a_spec_is_a_plain_file_with_one_name(tmp_path: Path, kind: str) -> None:
    spec, other = tmp_path / "spec.yaml", tmp_path / "other"
    other.write_text("secret: 1")
    {**ODD, "link": lambda path: path.symlink_to(other), "hard link": lambda path: os.link(other, path)}[kind](spec)
    with pytest.raises(SpecError) as refused:
        load(spec, "dropped.yaml")
    assert str(refused.value).startswith("dropped.yaml: ")
    assert re.search("plain file|links are not followed|hard link|No such device|directory", str(refused.value))
    assert "secret" not in str(refused.value)


def test_a_spec_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    with open(tmp_path / "spec.yaml", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SpecError, match="larger than 1 MiB"):
        load(tmp_path / "spec.yaml", "dropped.yaml")
