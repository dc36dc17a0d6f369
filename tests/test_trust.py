"""The benchmark of trust, on a few specs: what it counts is there to be counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.trust.bad import bad, bad_specs, clear
from benchmarks.trust.soak import Look, rise, soak

ROOT = Path(__file__).parent.parent


def test_a_small_flood_is_claimed_in_the_order_of_arrival_and_told_as_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.trust", "flood", "--specs", "30", "--json", "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    figures = json.loads(done.stdout)["flood"]
    assert figures["claimed"] == 30
    assert figures["claimed in the order of arrival"] is True
    assert figures["scrapes"] > 0
    assert (done.returncode == 0) is figures["ok"], done.stderr


def test_there_are_more_than_40_kinds_of_bad_specs_and_each_of_the_first_ends_with_a_clear_error(
    tmp_path: Path,
) -> None:
    assert len(set(bad_specs(tmp_path / "models").values())) > 40
    (tmp_path / "work").mkdir()
    figures = bad(tmp_path / "work", 4)
    assert figures["in failed/ with an error"] == 4
    assert figures["kinds without a clear error"] == {}
    assert figures["daemon restarts"] == 0


def test_what_nobody_foresaw_is_no_clear_error() -> None:
    assert clear("a.yaml: line 3: unknown key modles")
    for text in ("", "unexpected error: KeyError: 'a'", "worker was killed by signal 9", "worker ended with no report"):
        assert not clear(text)


def test_a_short_soak_tells_what_the_daemon_holds(tmp_path: Path) -> None:
    figures = soak(tmp_path, 0.3, 1)
    assert figures["jobs"] > 3
    assert figures["daemon restarts"] == 0
    assert figures["looks"] >= 3


def test_what_grows_is_seen_and_noise_is_not() -> None:
    even = [Look(5.0 * i, 30_000_000 + 4096 * (i % 3), 20 + i % 2, 5) for i in range(200)]
    assert abs(rise(even, "resident")) < 5000
    assert abs(rise(even, "descriptors")) < 0.1
    leak = [Look(5.0 * i, 30_000_000 + 20_000 * i, 20 + i // 50, 5) for i in range(200)]
    assert rise(leak, "resident") > 3e6
    assert rise(leak, "descriptors") > 2
