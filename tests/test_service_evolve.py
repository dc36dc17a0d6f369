"""Searches in the daemon: progress, cancel and retry, workers that die, and what a dropped spec must not do."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mergecore
from mergecore.cli import main
from service.commands import cancel_command, retry_command, status_command
from service.config import WORKER_COMMAND, load_config
from service.duplicates import UNLIKE_ANY, fingerprint
from service.errors import ServiceError
from tests.models import tensor_bytes
from tests.searches import calls, exists, history, hold, release, search_dict, write_search
from tests.service_support import DaemonProcess, running_daemon, wait_until


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search and its result without a daemon."""
    folder = tmp_path_factory.mktemp("small")
    mergecore.merge(write_search(folder), folder / "out")
    return folder


@pytest.fixture
def folder(small: Path) -> Iterator[Path]:
    """The search, its scorer not called yet."""
    (small / "calls").unlink(missing_ok=True)
    yield small
    release(small)


def daemon_options(folder: Path, **options: Any) -> dict[str, Any]:
    command = list(WORKER_COMMAND)
    return {"worker_command": command, "models": [str(folder / "models")], "allow_commands": True, **options}


def held_scorer(daemon: DaemonProcess, folder: Path) -> int:
    """The scorer's process, which waits."""
    held = folder / "held"
    wait_until(held.exists, f"the scorer; log:\n{daemon.log()}")
    return int(held.read_text())


def test_a_dropped_search_runs_with_its_progress_and_gives_what_the_command_line_gives(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(folder)
    with running_daemon(tmp_path / "d", **daemon_options(folder)) as daemon:
        daemon.drop("search.json", **search_dict(folder))
        held_scorer(daemon, folder)
        status = wait_until(
            lambda: next((one for one in daemon.spool.running_jobs() if one.progress.get("search")), None), "progress"
        )
        assert status.progress["search"] == {
            "generation": 1, "generations": 3, "candidate": 1, "population": 4, "best": None,
        }  # fmt: skip
        assert status_command(daemon.spool.root, None, False) == 0
        assert ", generation 1/3 " in capsys.readouterr().out
        seen = status.progress["seconds"]
        wait_until(lambda: daemon.spool.running_jobs()[0].progress["seconds"] > seen, "a sign of life")
        release(folder)
        job = daemon.wait_for("done", "search.json")["search.json"]
        out = Path(job.output)
        assert daemon.metric('mergecore_jobs_total{method="task_arithmetic",state="done"}') == 1
        tensors = 13 * 12
        assert (job.progress["tensors_done"], job.progress["tensors_total"]) == (tensors, tensors)
        assert daemon.metric("mergecore_tensors_total") == tensors
        assert os.listdir(daemon.outputs) == [out.name]
    assert history(out) == history(folder / "out")
    assert tensor_bytes(out) == tensor_bytes(folder / "out")


def test_a_cancelled_search_ends_its_scorer_and_a_retry_scores_nothing_twice(folder: Path, tmp_path: Path) -> None:
    with running_daemon(tmp_path / "d", **daemon_options(folder)) as daemon:
        daemon.drop("search.json", **search_dict(folder))
        wait_until(lambda: len(calls(folder)) >= 3, "some scores")
        hold(folder)
        scorer = held_scorer(daemon, folder)
        before = len(calls(folder))
        cancel_command(daemon.spool.root, "search.json")
        daemon.wait_for("cancelled", "search.json")
        assert not exists(scorer)
        release(folder)
        retry_command(daemon.spool.root, "search.json")
        out = Path(daemon.wait_for("done", "search.json")["search.json"].output)
    assert len(calls(folder)) == 12 + 1  # the one that was cancelled
    assert calls(folder)[before - 1] == calls(folder)[before]
    assert history(out) == history(folder / "out")


def test_a_worker_that_is_killed_is_replaced_and_the_search_goes_on(folder: Path, tmp_path: Path) -> None:
    with running_daemon(tmp_path / "d", **daemon_options(folder)) as daemon:
        daemon.drop("search.json", **search_dict(folder))
        wait_until(lambda: len(calls(folder)) >= 5, "some scores")
        hold(folder)
        scorer = held_scorer(daemon, folder)
        daemon.kill_worker("search.json")
        wait_until(lambda: not exists(scorer), "the scorer's end")
        release(folder)
        job = daemon.wait_for("done", "search.json")["search.json"]
    assert job.attempts == 2
    assert len(calls(folder)) == 12 + 1
    assert history(Path(job.output)) == history(folder / "out")


def test_a_search_that_was_published_by_a_worker_that_died_right_after_is_done(folder: Path, tmp_path: Path) -> None:
    """The second attempt finds the first one's result, and does not search again."""
    code = (
        "import os, signal, sys\n"
        "import service.worker as worker\n"
        "record = worker.Reporter.record\n"
        "def dying(self, **changes):\n"
        f"    if 'result' in changes and not os.path.exists({str(tmp_path / 'died')!r}):\n"
        f"        open({str(tmp_path / 'died')!r}, 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    record(self, **changes)\n"
        "worker.Reporter.record = dying\n"
        "sys.exit(worker.main())\n"
    )
    options = daemon_options(folder, worker_command=[sys.executable, "-c", code])
    with running_daemon(tmp_path / "d", **options) as daemon:
        daemon.drop("search.json", **search_dict(folder))
        job = daemon.wait_for("done", "search.json")["search.json"]
        assert job.attempts == 2
    assert len(calls(folder)) == 12


def test_commands_are_refused_unless_the_configuration_allows_them(folder: Path, tmp_path: Path) -> None:
    with running_daemon(tmp_path / "d", **daemon_options(folder, allow_commands=None)) as daemon:
        daemon.drop("search.json", **search_dict(folder))
        error = daemon.wait_for("failed", "search.json")["search.json"].error
        assert "search.json:1: evolve.score.command: this server runs no commands of specs (allow_commands" in error
        assert not list(daemon.outputs.iterdir())
    assert calls(folder) == []


def test_texts_are_read_below_the_model_folders_only(folder: Path, tmp_path: Path) -> None:
    secret, link = tmp_path / "secret.txt", folder / "models" / "link.txt"
    secret.write_text("secret")
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    with running_daemon(tmp_path / "d", **daemon_options(folder)) as daemon:
        names = [str(secret), "../../secret.txt", "link.txt", "/dev/zero", "base"]
        for number, name in enumerate(names):
            daemon.drop(f"{number}.json", **search_dict(folder, score={"text": [name]}))
        failed = daemon.wait_for("failed", *(f"{number}.json" for number in range(len(names))))
        for number in range(4):
            error = failed[f"{number}.json"].error
            assert "evolve.score.text[0]: " in error
            assert "model folder" in error
            assert "does not lie below" in error or "was not found" in error
        assert "is not a file" in failed["4.json"].error
        assert not list(daemon.outputs.iterdir())


def test_a_search_that_a_command_scores_is_like_no_other(folder: Path, tmp_path: Path) -> None:
    """Who knows what the command does; a search by texts is known by them."""

    def marked(**score: Any) -> str:
        spec = search_dict(folder, **score)
        return fingerprint(mergecore.load_spec(spec), lambda model, revision: Path(model))

    assert marked() == UNLIKE_ANY
    text = tmp_path / "text.txt"
    text.write_text("one")
    first = marked(score={"text": [str(text)]})
    assert first == marked(score={"text": [str(text)]}) != UNLIKE_ANY
    assert first != marked(score={"text": [str(text)]}, generations=4)
    text.write_text("another")
    assert first != marked(score={"text": [str(text)]})


def test_whether_commands_are_allowed_is_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {"spool": tmp_path / "s", "outputs": tmp_path / "o"}
    assert load_config(None, folders).allow_commands is False
    with pytest.raises(ServiceError, match="allow_commands is 1, but must be true or false"):
        load_config(None, {**folders, "allow_commands": 1})
    monkeypatch.setenv("MERGECORE_ALLOW_COMMANDS", "true")
    assert load_config(None, folders).allow_commands is True


def test_the_command_line_needs_no_leave(folder: Path, tmp_path: Path) -> None:
    assert main(["merge", str(folder / "search.json"), str(tmp_path / "out")]) == 0
    assert history(tmp_path / "out") == history(folder / "out")
