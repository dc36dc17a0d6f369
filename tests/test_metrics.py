"""The metrics: what the design promises, before, while and after jobs; as promtool and a real Prometheus read them."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import METHODS, STATES, Metrics, build_versions, method_label
from service.status import JobStatus
from tests.conftest import require_tool
from tests.service_support import ROOT, running_daemon, wait_until

PROMISED = {
    "mergecore_jobs": ("counter", {"state", "method"}),
    "mergecore_queue_jobs": ("gauge", set()),
    "mergecore_job_duration_seconds": ("histogram", set()),
    "mergecore_tensors": ("counter", set()),
    "mergecore_read_bytes": ("counter", set()),
    "mergecore_written_bytes": ("counter", set()),
    "mergecore_job_progress_ratio": ("gauge", {"job"}),
    "mergecore_worker_resident_bytes": ("gauge", set()),
    "mergecore_warm_workers": ("gauge", set()),
    "mergecore_worker_starts": ("counter", {"worker"}),
    "mergecore_warm_worker_deaths": ("counter", set()),
    "mergecore_last_success_timestamp_seconds": ("gauge", set()),
    "mergecore_running_jobs": ("gauge", set()),
    "mergecore_paused": ("gauge", set()),
    "mergecore_memory_budget_bytes": ("gauge", set()),
    "mergecore_memory_reserved_bytes": ("gauge", set()),
    "mergecore_device_jobs": ("gauge", set()),
    "mergecore_device_jobs_reserved": ("gauge", set()),
    "mergecore_memory_limit_bytes": ("gauge", set()),
    "mergecore_filesystem_free_bytes": ("gauge", {"folder"}),
    "mergecore_filesystem_size_bytes": ("gauge", {"folder"}),
    "mergecore_build_info": ("gauge", {"version", "torch", "cuda"}),
}


def read(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def progress(**values: float) -> JobStatus:
    return JobStatus(progress=dict(values))


def test_exactly_the_promised_metrics_exist_with_their_types_and_labels() -> None:
    metrics = Metrics()
    metrics.started("a-job")
    metrics.watch(spool=Path("/"))
    text = prometheus_client.generate_latest(metrics.registry).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    own = {name: family for name, family in families.items() if not name.startswith("process_")}
    found = {
        name: (family.type, {label for sample in family.samples for label in sample.labels} - {"le"})
        for name, family in own.items()
    }
    assert found == PROMISED
    assert "process_resident_memory_bytes" in families
    assert all(family.documentation for family in families.values())


def test_every_registered_method_is_a_label_of_its_own() -> None:
    from mergecore.methods import METHODS as REGISTERED

    assert set(REGISTERED) <= set(METHODS)


@given(st.text())
def test_the_method_label_is_bounded(method: str) -> None:
    assert method_label(method) in {*METHODS, "other", "unknown"}
    assert method_label("") == "unknown"
    assert method_label("widen") == "widen"


def test_the_series_of_failures_exist_before_the_first_failure() -> None:
    metrics = Metrics()
    for state in STATES:
        assert read(metrics, "mergecore_jobs_total", state=state, method="widen") == 0
        assert read(metrics, "mergecore_jobs_total", state=state, method="unknown") == 0


def test_a_job_is_seen_while_it_runs_and_gone_when_it_ended() -> None:
    metrics = Metrics()
    metrics.started("j")
    assert read(metrics, "mergecore_job_progress_ratio", job="j") == 0
    metrics.progressed("j", progress(ratio=0.25))
    assert read(metrics, "mergecore_job_progress_ratio", job="j") == 0.25
    metrics.ended("j", "done", "widen", 12.0)
    assert read(metrics, "mergecore_job_progress_ratio", job="j") is None
    assert read(metrics, "mergecore_jobs_total", state="done", method="widen") == 1
    assert read(metrics, "mergecore_job_duration_seconds_sum") == 12
    metrics.progressed("j", progress(tensors_done=9))
    assert read(metrics, "mergecore_tensors_total") == 0


def test_an_interruption_is_counted_but_is_no_duration() -> None:
    metrics = Metrics()
    metrics.started("j")
    metrics.ended("j", "interrupted", "", 3.0)
    assert read(metrics, "mergecore_jobs_total", state="interrupted", method="unknown") == 1
    assert read(metrics, "mergecore_job_duration_seconds_count") == 0


reports = st.lists(
    st.fixed_dictionaries(
        {
            "tensors_done": st.integers(-5, 100) | st.none() | st.text(),
            "bytes_read": st.integers(0, 2**50) | st.floats(),
            "bytes_written": st.integers(0, 2**50) | st.booleans(),
            "ratio": st.floats() | st.text(),
        }
    )
)


@given(st.lists(reports, max_size=3))
def test_counters_never_go_down_whatever_the_status_files_say(runs: list[list[dict[str, Any]]]) -> None:
    metrics = Metrics()
    names = ("mergecore_tensors_total", "mergecore_read_bytes_total", "mergecore_written_bytes_total")
    before = [0.0, 0.0, 0.0]
    for run in runs:
        metrics.started("j")
        for report in run:
            metrics.progressed("j", JobStatus(progress=report))
            now = [read(metrics, name) or 0.0 for name in names]
            assert all(old <= new for old, new in zip(before, now, strict=True))
            assert 0 <= (read(metrics, "mergecore_job_progress_ratio", job="j") or 0) <= 1
            before = now
        metrics.ended("j", "failed", "linear", 0.0)


@given(st.lists(st.lists(st.integers(0, 1000), min_size=1).map(sorted), max_size=4))
def test_counters_add_up_what_all_jobs_did(jobs: list[list[int]]) -> None:
    metrics = Metrics()
    for i, steps in enumerate(jobs):
        metrics.started(str(i))
        for step in steps:
            metrics.progressed(str(i), progress(bytes_read=step))
        metrics.ended(str(i), "done", "linear", 1.0)
    assert read(metrics, "mergecore_read_bytes_total") == sum(steps[-1] for steps in jobs)


def test_what_an_earlier_attempt_did_is_not_counted_again() -> None:
    metrics = Metrics()
    metrics.started("j")
    metrics.progressed("j", progress(tensors_done=12, tensors_done_before=10, bytes_read=5, bytes_read_before=7))
    assert read(metrics, "mergecore_tensors_total") == 2
    assert read(metrics, "mergecore_read_bytes_total") == 0


def test_build_info_tells_the_versions_of_what_is_installed() -> None:
    import torch

    import mergecore

    versions = build_versions()
    assert versions == {
        "version": mergecore.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
    }


def test_importing_the_metrics_imports_no_torch() -> None:
    code = (
        "import sys, service.metrics as m; m.Metrics(); assert 'torch' not in sys.modules and 'yaml' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- at a real daemon ---


def test_the_endpoint_shows_a_job_before_while_and_after_it_runs(tmp_path: Path) -> None:
    ended = 'mergecore_jobs_total{method="widen",state="done"}'
    with running_daemon(tmp_path) as daemon:
        assert daemon.metric(ended) == 0
        assert daemon.metric("mergecore_queue_jobs") == 0
        assert daemon.metric("mergecore_last_success_timestamp_seconds") == 0
        assert "mergecore_job_progress_ratio{" not in daemon.scrape()

        daemon.drop("a.yaml", method="widen", steps=4, bytes=1000, gate="go")
        daemon.drop("b.yaml", method="no such method")
        job = wait_until(lambda: daemon.jobs("running").get("a.yaml"), "the job").job
        wait_until(lambda: daemon.metric(f'mergecore_job_progress_ratio{{job="{job}"}}') == 0.75, "three of four steps")
        assert daemon.metric("mergecore_tensors_total") == 3
        assert daemon.metric("mergecore_read_bytes_total") == 3000
        assert (daemon.metric("mergecore_worker_resident_bytes") or 0) > 1 << 20
        wait_until(lambda: daemon.metric("mergecore_queue_jobs") == 1, "one that waits")

        daemon.open_gate()
        daemon.wait_for("done", "a.yaml", "b.yaml")
        wait_until(lambda: daemon.metric("mergecore_worker_resident_bytes") == 0, "no worker")
        assert daemon.metric(ended) == 1
        assert daemon.metric('mergecore_jobs_total{method="other",state="done"}') == 1
        assert daemon.metric("mergecore_tensors_total") == 5
        assert daemon.metric("mergecore_written_bytes_total") == 5000
        assert daemon.metric("mergecore_job_duration_seconds_count") == 2
        assert daemon.metric("mergecore_queue_jobs") == 0
        success = daemon.metric("mergecore_last_success_timestamp_seconds") or 0
        assert success > 1e9
        assert "mergecore_job_progress_ratio{" not in daemon.scrape()

    with running_daemon(tmp_path) as daemon:
        assert daemon.metric(ended) == 0, "a new process starts its counters anew"
        assert daemon.metric("mergecore_last_success_timestamp_seconds") == pytest.approx(success, abs=5)


def test_failures_and_interruptions_are_counted_by_their_state(tmp_path: Path) -> None:
    with running_daemon(tmp_path, rescan=0.1) as daemon:
        daemon.drop("bad.yaml", exit=2, method="ties")
        daemon.wait_for("failed", "bad.yaml")
        assert daemon.metric('mergecore_jobs_total{method="ties",state="failed"}') == 1
        daemon.drop("a.yaml", gate="go")
        daemon.wait_started("a.yaml")
        subprocess.run(["kill", str(daemon.worker("a.yaml"))], check=True)
        daemon.wait_started("a.yaml", times=2)
        assert daemon.metric('mergecore_jobs_total{method="linear",state="interrupted"}') == 1
        daemon.open_gate()
        daemon.wait_for("done", "a.yaml")


def test_the_port_is_open_on_the_configured_address_only(tmp_path: Path) -> None:
    with running_daemon(tmp_path, host="::1" if socket.has_ipv6 and _can_bind("::1") else "127.0.0.1") as daemon:
        assert re.fullmatch(r"http://(\[::1\]|127\.0\.0\.1):\d+", daemon.url)
        assert "mergecore_build_info" in daemon.scrape()
    with running_daemon(tmp_path, host="127.0.0.1") as daemon:
        port = int(daemon.url.rpartition(":")[2])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)


def _can_bind(address: str) -> bool:
    try:
        with socket.create_server((address, 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_promtool_finds_nothing_to_object_to(tmp_path: Path) -> None:
    promtool = require_tool("promtool", package="prometheus")
    with running_daemon(tmp_path) as daemon:
        daemon.drop("a.yaml", method="widen", steps=2, gate="go")
        wait_until(lambda: "mergecore_job_progress_ratio{" in daemon.scrape(), "a running job")
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=daemon.scrape(), text=True, capture_output=True, check=False
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
        daemon.open_gate()
        daemon.wait_for("done", "a.yaml")


def test_a_real_prometheus_scrapes_the_daemon(tmp_path: Path) -> None:
    prometheus = require_tool("prometheus", package="prometheus")
    with running_daemon(tmp_path) as daemon, socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        config = tmp_path / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n"
            f"scrape_configs: [{{job_name: mergecore, static_configs: [{{targets: ['{daemon.url[7:]}']}}]}}]\n"
        )
        with (tmp_path / "prometheus.log").open("wb") as log:
            server = subprocess.Popen(
                [
                    prometheus,
                    f"--config.file={config}",
                    f"--storage.tsdb.path={tmp_path / 'data'}",
                    f"--web.listen-address={address}",
                ],
                stdout=log,
                stderr=log,
            )
        try:

            def query(expression: str) -> float | None:
                url = f"http://{address}/api/v1/query?query={urllib.parse.quote(expression)}"
                try:
                    with urllib.request.urlopen(url, timeout=5) as answer:
                        found = json.load(answer)["data"]["result"]
                except (OSError, urllib.error.URLError):
                    assert server.poll() is None, (tmp_path / "prometheus.log").read_text()
                    return None
                return float(found[0]["value"][1]) if found else None

            wait_until(lambda: query('up{job="mergecore"}') == 1, "a first scrape")
            daemon.drop("a.yaml", method="widen", exit=2)
            daemon.wait_for("failed", "a.yaml")
            wait_until(
                lambda: (query('increase(mergecore_jobs_total{state="failed",method="widen"}[1m])') or 0) > 0,
                "the failure, as an alert would see it",
            )
            assert query("mergecore_queue_jobs") == 0
            assert query("count(mergecore_build_info)") == 1
        finally:
            server.terminate()
            server.wait(30)
