"""Jobs that are owned through leases: two real daemons on one spool, one of which sleeps as a hanging host does."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mergecore import load_spec, merge
from service import leases
from service import spool as spool_module
from service.commands import cancel_command, list_jobs, retry_command
from service.durable import copy_plain
from service.errors import ServiceError
from service.leases import Lease, LeaseLost, Tenancy, Watch, job_of, read_lease
from service.ownership import LEASES, LOCKS
from service.spool import Job, Spool
from tests.models import LLAMA, llama, moved, write_model
from tests.service_support import DaemonProcess, running_daemon, wait_until

SECONDS = 3.0
GATED = """
import sys, time
from pathlib import Path
import service.worker as worker
outputs = Path(sys.argv[sys.argv.index("--outputs") + 1])
report, install, stops = worker.Reporter.progress, worker.Stop.install, []

def progress(self, now):
    report(self, now)
    while now.tensors_done >= 3 and not (outputs / "go").exists() and not stops[0].requested:
        time.sleep(0.01)

def remembered(self):
    stops.append(self)
    install(self)

worker.Reporter.progress, worker.Stop.install = progress, remembered
sys.exit(worker.main())
"""


class Clocks:
    """The clocks of one host, turned by hand; they may have begun at any time."""

    owner, observer = 1000.0, 7e6

    def sleep(self, seconds: float) -> None:
        """Time goes on for all."""
        self.owner += seconds
        self.observer += seconds


def turned_by_hand(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(leases, "owner_clock", lambda: clocks.owner)
    monkeypatch.setattr(spool_module, "owner_clock", lambda: clocks.owner)
    monkeypatch.setattr(leases, "observer_clock", lambda: clocks.observer)
    return clocks


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return turned_by_hand(monkeypatch)


def spool_at(root: Path) -> Spool:
    spool = Spool(root, 60.0)
    spool.prepare(LEASES)
    return spool


def claimed(spool: Spool, name: str = "a.yaml") -> Job:
    (spool.incoming / name).write_text("{}")
    job = spool.claim(name)
    assert job is not None
    return job


# --- without a daemon ---


def test_a_job_is_taken_over_only_after_its_lease_was_seen_unchanged_for_its_seconds(
    tmp_path: Path, clock: Clocks
) -> None:
    job = claimed(spool_at(tmp_path))
    other = spool_at(tmp_path)
    assert list(other.adopt(set())) == []
    clock.sleep(20)
    job.owned.renew()
    assert list(other.adopt(set())) == [], "it was renewed: the count starts anew"
    clock.sleep(59.9)
    assert list(other.adopt(set())) == []
    clock.sleep(0.2)
    (taken,) = other.adopt(set())
    assert (taken.name, taken.status().spec) == (job.name, "a.yaml")
    assert not job.folder.exists()
    assert [one.state for one in other.jobs()] == ["running"]


def test_the_clock_of_another_host_decides_nothing(tmp_path: Path, clock: Clocks) -> None:
    job = claimed(spool_at(tmp_path))
    here, clock.owner = clock.owner, 5e8  # it has been up for long
    other = spool_at(tmp_path)
    assert list(other.adopt(set())) == []
    clock.sleep(59)
    assert list(other.adopt(set())) == []
    clock.owner = here + 1
    assert not job.owned.lost


def test_the_time_that_an_observer_slept_through_counts_for_nothing(tmp_path: Path, clock: Clocks) -> None:
    claimed(spool_at(tmp_path))
    other = spool_at(tmp_path)
    assert list(other.adopt(set())) == []
    clock.owner += 3600  # suspended: the monotonic clock stands still
    assert list(other.adopt(set())) == []


def test_an_owner_has_given_up_before_anybody_takes_over(tmp_path: Path, clock: Clocks) -> None:
    job = claimed(spool_at(tmp_path))
    tenancy, watch = Tenancy(job.folder), Watch()
    assert not watch.has_run_out(job.folder)
    assert not tenancy.over()
    clock.sleep(39.9)
    assert not job.owned.lost
    assert not tenancy.over()
    clock.sleep(0.2)
    assert job.owned.lost
    assert tenancy.over()
    assert not watch.has_run_out(job.folder)
    clock.sleep(-30)
    assert job.owned.lost, "for ever"
    with pytest.raises(LeaseLost):
        job.finish("done")
    assert job.folder.exists()
    job.release()
    assert job.folder.exists(), "it is not ours to give"


def test_a_renewal_that_came_too_late_counts_for_nothing(
    tmp_path: Path, clock: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = claimed(spool_at(tmp_path))
    replace = os.replace

    def slow(source: Path, target: Path) -> None:
        replace(source, target)
        clock.sleep(35)  # the file system took its time

    clock.sleep(10)
    monkeypatch.setattr(os, "replace", slow)
    job.owned.renew()
    assert job.owned.lost


def test_a_renewal_that_fails_is_tried_again_until_time_is_up(
    tmp_path: Path, clock: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = claimed(spool_at(tmp_path))

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", full)
        clock.sleep(35)
        assert job.owned.renew() <= 1.0
    assert not job.owned.lost
    job.owned.renew()
    clock.sleep(35)
    assert not job.owned.lost


def test_a_claim_whose_lease_cannot_be_written_leaves_the_spec_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = spool_at(tmp_path)
    (spool.incoming / "a.yaml").write_text("{}")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            spool.claim("a.yaml")
    assert os.listdir(spool.running) == []
    assert os.listdir(spool.incoming) == ["a.yaml"]


def test_of_many_takers_one_gets_the_job_and_the_former_owner_can_do_nothing(tmp_path: Path, clock: Clocks) -> None:
    job = claimed(spool_at(tmp_path))
    takers = [spool_at(tmp_path) for _ in range(5)]
    for taker in takers:
        assert list(taker.adopt(set())) == []
    clock.sleep(30)
    # As if it had checked just before it fell asleep: whatever it does next goes by path.
    assert not job.owned.lost
    clock.sleep(31)
    got = [one for taker in takers for one in taker.adopt(set())]
    assert len(got) == 1
    clock.sleep(-31)
    for act in (lambda: job.update(error="I was there"), lambda: job.finish("failed"), lambda: job.cancel("me")):
        with pytest.raises(FileNotFoundError):
            act()
    job.release()
    assert job.owned.lost
    assert [one.state for one in takers[0].jobs()] == ["running"]
    clock.sleep(31)
    assert got[0].status().error == ""
    got[0].finish("done")
    assert sorted(path.name for path in (tmp_path / "done" / job.name).iterdir()) == ["spec.yaml", "status.json"]


def test_what_the_former_owner_has_open_is_not_what_the_new_one_has(tmp_path: Path, clock: Clocks) -> None:
    job = claimed(spool_at(tmp_path))
    other = spool_at(tmp_path)
    list(other.adopt(set()))
    (job.folder / "log").write_text("merging\n")
    folder = os.open(job.folder, os.O_RDONLY | os.O_DIRECTORY)
    with (job.folder / "log").open("a") as output, (job.folder / "status.json").open("r+") as status:
        clock.sleep(61)
        (taken,) = other.adopt(set())
        taken.update(error="mine")
        for file in (output, status):
            file.write("I was only asleep" * 100)
            file.flush()
        with pytest.raises(FileNotFoundError):
            os.close(os.open("status.json", os.O_WRONLY | os.O_CREAT, dir_fd=folder))
    os.close(folder)
    assert taken.status().error == "mine"
    assert (taken.folder / "log").read_text() == "merging\n"
    assert sorted(os.listdir(taken.folder)) == ["lease", "log", "spec.yaml", "status.json"]
    assert os.listdir(tmp_path / "running") == [taken.folder.name]


def test_a_taker_that_sleeps_half_way_gets_nothing_and_breaks_nothing(
    tmp_path: Path, clock: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed(spool_at(tmp_path)).update(error="before")
    slow, quick = spool_at(tmp_path), spool_at(tmp_path)
    assert list(slow.adopt(set())) == list(quick.adopt(set())) == []
    clock.sleep(61)
    taken: list[Job] = []

    def sleeping(source: Path, target: Path) -> None:
        monkeypatch.setattr(spool_module, "copy_plain", copy_plain)
        assert list(quick.adopt(set())) == []
        clock.sleep(121)
        taken.extend(quick.adopt(set()))
        copy_plain(source, target)

    monkeypatch.setattr(spool_module, "copy_plain", sleeping)
    assert list(slow.adopt(set())) == []
    (job,) = taken
    assert job.status().error == "before"
    assert os.listdir(tmp_path / "running") == [job.folder.name]


def test_a_job_that_is_given_back_is_free_at_once_and_a_claim_without_a_spec_is_cleaned_up(
    tmp_path: Path, clock: Clocks
) -> None:
    job = claimed(spool_at(tmp_path))
    job.release()
    other = spool_at(tmp_path)
    (again,) = other.adopt(set())
    assert job_of(again.folder) == again.name == job.name
    again.finish("failed")
    retry_command(tmp_path, again.name)
    (third,) = other.adopt(set())
    third.finish("done")
    empty = other._new_job("x.yaml")
    assert list(spool_at(tmp_path).adopt(set())) == []
    watcher = spool_at(tmp_path)
    list(watcher.adopt(set()))
    clock.sleep(61)
    assert list(watcher.adopt(set())) == []
    assert not empty.folder.exists()
    assert os.listdir(tmp_path / "running") == []


def test_a_lease_that_cannot_be_read_is_one_of_the_longest_kind_and_over_for_its_worker(
    tmp_path: Path, clock: Clocks
) -> None:
    folder = tmp_path / "a@b"
    folder.mkdir()
    watch, tenancy = Watch(), Tenancy(folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text('{"seconds": 1, "renewed": 1e12}')
    for content in (None, b"\xff{", b'{"seconds": 1e9, "renewed": "x"}', elsewhere):
        if isinstance(content, bytes):
            (folder / "lease").write_bytes(content)
        elif content is not None:
            replaced_by_link(folder / "lease", content)
        assert read_lease(folder).seconds == 3600
        assert Tenancy(folder).over()
        watch.has_run_out(folder)
        clock.sleep(3599)
        assert not watch.has_run_out(folder)
    clock.sleep(2)
    assert watch.has_run_out(folder)
    (folder / "lease").unlink()
    Lease(folder, 60.0, clock.owner)
    assert read_lease(folder).seconds == 60
    assert not tenancy.over()
    assert elsewhere.read_text() == '{"seconds": 1, "renewed": 1e12}'


# --- how a spool tells ---


def test_how_jobs_are_owned_is_written_down_and_the_other_way_is_refused(tmp_path: Path) -> None:
    for how, other in ((LOCKS, LEASES), (LEASES, LOCKS)):
        root = tmp_path / how
        Spool(root).prepare(how)
        assert (root / "ownership").read_text() == f"{how}\n"
        for _ in range(2):
            again = Spool(root)
            again.prepare()
            assert again.leased == (how == LEASES)
        with pytest.raises(ServiceError, match=rf"owned through {how}, but the configuration asks for {other};"):
            Spool(root).prepare(other)
    new = Spool(tmp_path / "new")
    new.prepare()
    assert not new.leased


def replaced_by_link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def replaced_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda marker: marker.write_text(""),
        lambda marker: marker.write_text("lea"),
        lambda marker: replaced_by_link(marker, Path("/nowhere")),
        replaced_by_folder,
        replaced_by_pipe,
    ],
    ids=["empty", "torn", "link", "folder", "pipe"],
)
def test_a_word_that_cannot_be_read_never_means_locks(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    job = claimed(spool_at(tmp_path))
    spoil(tmp_path / "ownership")
    for how in (None, LOCKS, LEASES):
        with pytest.raises(ServiceError, match="it is not known how its jobs are owned"):
            Spool(tmp_path).prepare(how)
    for act in (lambda: cancel_command(tmp_path, job.name), lambda: list(Spool(tmp_path).adopt(set()))):
        with pytest.raises(ServiceError, match="it is not known how its jobs are owned"):
            act()
    assert (job.folder / "spec.yaml").exists()


def test_of_two_first_starts_that_disagree_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def late(source: Path, target: Path) -> None:
        monkeypatch.undo()
        Spool(tmp_path).prepare(LEASES)
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(ServiceError, match=r"owned through leases, says .*/ownership, and not through locks"):
        Spool(tmp_path).prepare()
    assert sorted(os.listdir(tmp_path)) == ["done", "failed", "incoming", "ownership", "running"]


def test_a_spool_whose_jobs_are_owned_otherwise_is_refused_though_its_word_is_gone(
    tmp_path: Path, clock: Clocks
) -> None:
    leased, locked = tmp_path / "leased", tmp_path / "locked"
    claimed(spool_at(leased))
    spool = Spool(locked)
    spool.prepare()
    claimed(spool).release()
    for root, other in ((leased, LOCKS), (locked, LEASES)):
        (root / "ownership").unlink()
        with pytest.raises(ServiceError, match=rf"such a daemon finish it, .* before jobs are owned through {other}"):
            Spool(root).prepare(other)
        assert not (root / "ownership").exists()


# --- daemons ---


def leased_daemon(folder: Path, **options: Any) -> Any:
    return running_daemon(folder, **{"ownership": "leases", "lease_seconds": SECONDS, "rescan": 0.2, **options})


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
    worker = tmp_path / "worker.py"
    worker.write_text(f"{prelude}import sys, service.worker\nsys.exit(service.worker.main())\n")
    options = {"worker_command": [sys.executable, "-P", str(worker)], "models": [str(models)]}
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


@pytest.fixture
def models(tmp_path: Path) -> Path:
    tensors = llama(hidden=16, vocabulary=24)
    for i, name in enumerate("ab"):
        write_model(tmp_path / "models" / name, moved(tensors, 1e-3, i), {**LLAMA, "num_hidden_layers": 2})
    return tmp_path / "models"


def spec(output: str = "out") -> dict[str, Any]:
    entries = [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]
    return {"merge_method": "linear", "models": entries, "dtype": "bfloat16", "run": {"output": output}}


def digest(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*.safetensors")}


def process_of(daemon: DaemonProcess, attempt: int = 1) -> psutil.Process:
    """The worker of this attempt, in the middle of its merge."""

    def half_way() -> int:
        status = daemon.jobs("running").get("a.yaml")
        begun = status is not None and status.attempts == attempt and status.progress.get("tensors_done", 0) >= 3
        return status.pid if status is not None and begun else 0

    return psutil.Process(wait_until(half_way, f"the middle of the merge; log: {daemon.log()}"))


@pytest.mark.parametrize("sleeps", ["daemon and worker", "daemon"])
def test_the_job_of_a_host_that_hangs_is_finished_once_by_another_and_the_woken_one_publishes_nothing(
    tmp_path: Path, models: Path, sleeps: str
) -> None:
    expected = digest(merge(load_spec(spec()), tmp_path / "whole", resolve=lambda name, revision: models / name).output)
    gated = tmp_path / "gated_worker.py"
    gated.write_text(GATED)
    options = {"worker_command": [sys.executable, "-P", str(gated)], "models": [str(models)]}
    with leased_daemon(tmp_path / "d", **options) as one:
        one.drop("a.yaml", **spec())
        worker = process_of(one)
        log = next(one.spool.running.iterdir()).name
        os.kill(one.process.pid, signal.SIGSTOP)
        if sleeps != "daemon":
            worker.suspend()
        with leased_daemon(tmp_path / "d", **options) as two:
            wait_until(lambda: "taken over; resuming" in two.log(), "the other daemon")
            assert log not in os.listdir(one.spool.running)
            if sleeps == "daemon":
                # It gets on by itself at the gate, and finds that nobody renews its lease.
                two.open_gate()
                wait_until(lambda: worker.status() == psutil.STATUS_ZOMBIE, "the end of the first worker")
            else:
                process_of(two, attempt=2)
                os.kill(one.process.pid, signal.SIGCONT)
                worker.resume()
                wait_until(lambda: "no longer ours" in one.log(), f"the woken one; log: {one.log()}")
                assert not (one.outputs / "out").exists()
                two.open_gate()
            done = two.wait_for("done", "a.yaml")["a.yaml"]
            os.kill(one.process.pid, signal.SIGCONT)
            wait_until(lambda: "no longer ours" in one.log(), f"the woken one; log: {one.log()}")
            assert done.attempts == 2
            assert done.result["resumed"] is False, "what the other one may still write into is not gone on with"
            assert digest(one.outputs / "out") == expected
            text = (one.spool.done / done.job / "log").read_text()
            assert text.count(" INFO done: ") == 1
            assert "mergecore_jobs_total{" in two.scrape()
            assert two.metric('mergecore_jobs_total{method="linear",state="done"}') == 1
            assert one.metric('mergecore_jobs_total{method="linear",state="done"}') == 0
            assert sorted(os.listdir(one.outputs)) == ["go", "out"]
            assert os.listdir(one.spool.running) == []
            one.drop("b.yaml", **spec("other"))
            one.wait_for("done", "b.yaml")


SLEEPY = """
import os, signal, sys, time
from pathlib import Path
import service.publishing as publishing, service.worker as worker
folder, outputs = Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outputs") + 1])
rename = os.rename

def sleeping(source, target, **places):
    if target == "out":
        if not (outputs.parent / "slept").exists():
            (outputs.parent / "slept").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            (outputs.parent / "second").touch()
            while not (outputs.parent / "go").exists():
                time.sleep(0.01)
    rename(source, target, **places)

publishing.os = type("os", (), {**vars(os), "rename": staticmethod(sleeping)})
sys.exit(worker.main())
"""


def test_a_worker_that_wakes_in_the_moment_of_publishing_publishes_nothing(tmp_path: Path, models: Path) -> None:
    # It sleeps between its last look at the lease and the rename: no look can help, only that its folder has gone.
    sleepy = tmp_path / "sleepy_worker.py"
    sleepy.write_text(SLEEPY)
    options = {"worker_command": [sys.executable, "-P", str(sleepy)], "models": [str(models)]}
    with leased_daemon(tmp_path / "d", **options) as one:
        one.drop("a.yaml", **spec())

        def asleep() -> int:
            pid = status.pid if (status := one.jobs("running").get("a.yaml")) else 0
            return pid if pid and psutil.Process(pid).status() == psutil.STATUS_STOPPED else 0

        pid = wait_until(asleep, f"the worker to sleep; log: {one.log()}")
        os.kill(one.process.pid, signal.SIGSTOP)
        with leased_daemon(tmp_path / "d", **options) as two:
            wait_until((tmp_path / "d" / "second").exists, "the second worker")
            os.kill(pid, signal.SIGCONT)
            wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "the end of the woken worker")
            assert not (two.outputs / "out").exists()
            os.kill(one.process.pid, signal.SIGCONT)
            wait_until(lambda: "no longer ours" in one.log(), "the woken daemon")
            (tmp_path / "d" / "go").touch()
            done = two.wait_for("done", "a.yaml")["a.yaml"]
            assert os.listdir(two.outputs) == ["out"]
            text = (two.spool.done / done.job / "log").read_text()
            assert text.count(" INFO done: ") == 1
            assert os.listdir(two.spool.running) == []


def test_a_host_that_dies_loses_its_job_to_another_one_after_its_lease(tmp_path: Path, models: Path) -> None:
    expected = digest(merge(load_spec(spec()), tmp_path / "whole", resolve=lambda name, revision: models / name).output)
    gated = tmp_path / "gated_worker.py"
    gated.write_text(GATED)
    options = {"worker_command": [sys.executable, "-P", str(gated)], "models": [str(models)]}
    with leased_daemon(tmp_path / "d", **options) as one:
        one.drop("a.yaml", **spec())
        process_of(one)
        (left,) = one.outputs.glob(".*@*")
        one.die()
        died = time.monotonic()
        with leased_daemon(tmp_path / "d", **options) as two:
            process_of(two, attempt=2)
            assert time.monotonic() - died >= SECONDS, "not before"
            assert not left.exists()
            two.open_gate()
            done = two.wait_for("done", "a.yaml")["a.yaml"]
            assert (done.attempts, list(done.former_leases.values())) == (2, ["expired"])
            assert digest(two.outputs / "out") == expected
            assert sorted(os.listdir(two.outputs)) == ["go", "out"]


def test_what_a_daemon_that_stopped_had_finished_is_gone_on_with(tmp_path: Path, models: Path) -> None:
    gated = tmp_path / "gated_worker.py"
    gated.write_text(GATED)
    options = {"worker_command": [sys.executable, "-P", str(gated)], "models": [str(models)]}
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
