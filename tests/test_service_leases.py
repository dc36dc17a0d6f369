"""Real daemons that own jobs through leases: together on one spool, stopped, cancelled, without any file locks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from mergecore import load_spec, merge
from service.commands import cancel_command, list_jobs, submit_command
from service.config import WORKER_COMMAND
from tests.leases import SECONDS, digest, gated, leased_daemon, process_of, spec, write_models
from tests.service_support import running_daemon


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return write_models(tmp_path)


def test_where_the_file_system_has_no_locks_leases_are_asked_for_and_do(tmp_path: Path, models: Path) -> None:
    prelude = (
        "import errno, fcntl\ndef flock(*_): raise OSError(errno.ENOLCK, 'No locks available')\nfcntl.flock = flock\n"
    )
    with (
        pytest.raises(AssertionError, match=r'has no file locks .* set ownership = "leases"'),
        running_daemon(tmp_path, prelude=prelude),
    ):
        pass
    assert not (tmp_path / "spool" / "ownership").exists()
    options = gated(tmp_path, models, f"{prelude}import sys, service.worker\nsys.exit(service.worker.main())\n")
    with leased_daemon(tmp_path, prelude=prelude, **options) as daemon:
        daemon.drop("a.yaml", **spec())
        daemon.wait_for("done", "a.yaml")
        assert os.listdir(daemon.outputs) == ["out"]
    with running_daemon(tmp_path, prelude=prelude) as daemon:
        assert "owned through leases" in daemon.log(), "the spool says so"


def test_two_daemons_with_leases_run_each_of_20_jobs_exactly_once(tmp_path: Path) -> None:
    with leased_daemon(tmp_path, jobs=2) as one, leased_daemon(tmp_path, jobs=2) as two:
        names = [f"{i:02}.yaml" for i in range(20)]
        for name in names:
            one.drop(name)
        one.wait_for("done", *names)
        assert sorted(line.split()[1] for line in one.record() if line.startswith("end")) == names
        assert len(one.record()) == 40
        assert list(two.spool.running.iterdir()) == []


def test_a_lease_is_renewed_while_the_job_runs_and_while_its_worker_stops(tmp_path: Path) -> None:
    with leased_daemon(tmp_path, stop_timeout=30) as one:
        one.drop("a.yaml", gate="go", deaf=True)
        one.wait_started("a.yaml")
        with leased_daemon(tmp_path, stop_timeout=30):
            time.sleep(1.3 * SECONDS)
            one.process.send_signal(signal.SIGTERM)
            time.sleep(1.3 * SECONDS)
            assert len(one.record()) == 1
            one.open_gate()
            assert one.process.wait(60) == 0
            assert one.wait_for("done", "a.yaml")["a.yaml"].attempts == 1


def test_cancelling_reaches_the_owner_and_a_stopped_daemon_leaves_its_job_free(tmp_path: Path) -> None:
    with leased_daemon(tmp_path) as one:
        one.drop("a.yaml", gate="never")
        one.wait_started("a.yaml")
        cancel_command(one.spool.root, "a.yaml")
        one.wait_for("cancelled", "a.yaml")
        one.drop("b.yaml", gate="go")
        one.wait_started("b.yaml")
        assert one.stop() == 0
        assert "@" not in os.listdir(one.spool.running)[0]
        assert [status.state for status in list_jobs(one.spool.root)] == ["interrupted", "cancelled"]
    with leased_daemon(tmp_path, lease_seconds=3600) as two:
        two.open_gate()
        assert two.wait_for("done", "b.yaml")["b.yaml"].attempts == 2


def test_what_a_daemon_that_stopped_had_finished_is_gone_on_with(tmp_path: Path, models: Path) -> None:
    options = gated(tmp_path, models)
    with leased_daemon(tmp_path / "d", **options) as one:
        one.drop("a.yaml", **spec())
        process_of(one)
        assert one.stop() == 0
    with leased_daemon(tmp_path / "d", lease_seconds=3600, **options) as two:
        two.open_gate()
        done = two.wait_for("done", "a.yaml")["a.yaml"]
        assert done.result["resumed"] is True
        assert done.result["output"] == done.output == str(two.outputs / "out")
        assert list(done.former_leases.values()) == ["returned"]
        assert sorted(os.listdir(two.outputs)) == ["go", "out"]


def test_merges_that_read_each_other_and_their_results_are_read_in_the_leased_place(
    tmp_path: Path, models: Path
) -> None:
    text = (
        "name: mean\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n---\n"
        "merge_method: linear\nmodels: [{model: mean}, {model: a}]\nparameters: {weight: 0.5}\nrun: {output: of/all}\n"
    )
    path = tmp_path / "several.yaml"
    path.write_text(text)
    whole = merge(load_spec(path), tmp_path / "whole", resolve=lambda name, revision: models / name).output
    with leased_daemon(tmp_path / "d", worker_command=list(WORKER_COMMAND), models=[str(models)]) as daemon:
        submit_command(path, daemon.spool.root)
        done = daemon.wait_for("done", "several.yaml")["several.yaml"]
        assert done.result["output"] == done.output == str(daemon.outputs / "of" / "all")
        assert digest(daemon.outputs / "of" / "all") == digest(whole)
        assert [name for _, _, names in os.walk(daemon.outputs) for name in names if name.startswith(".")] == []
        assert os.listdir(daemon.outputs) == ["of"]
        submit_command(path, daemon.spool.root)
        daemon.wait_for("duplicate", "several.yaml")
