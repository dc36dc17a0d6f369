"""The alert and recording rules as promtool evaluates them, and the dashboard, whose queries know real metrics only."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics import Metrics
from tests.conftest import require_tool
from tests.service_support import running_daemon

DEPLOY = Path(__file__).parent.parent / "service" / "deploy"
RULES = DEPLOY / "rules.yml"
DOCS = Path(__file__).parent.parent / "docs" / "operations.md"
NAME = re.compile(r"\b(?:mergecore|process)[a-z0-9_:]*|\bup\b")


def rules(kind: str) -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule[kind]: rule for group in groups for rule in group["rules"] if kind in rule}


def metric_names(expression: str) -> set[str]:
    """The names in an expression, without those in strings and label lists."""
    bare = re.sub(r"\b(?:by|without|on|ignoring|label_values) ?\([^()]*\)", "", re.sub(r'"[^"]*"', "", expression))
    return set(NAME.findall(bare))


def exported() -> set[str]:
    metrics = Metrics()
    metrics.started("j")
    metrics.watch(spool=Path("/"))
    return {sample.name for family in metrics.registry.collect() for sample in family.samples}


def promtool(*arguments: object) -> None:
    done = subprocess.run(
        [require_tool("promtool", package="prometheus"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", RULES)


def test_every_rule_names_metrics_that_the_daemon_exports() -> None:
    for rule in [*rules("alert").values(), *rules("record").values()]:
        assert metric_names(rule["expr"]) <= exported() | {"up"}
        assert metric_names(rule["expr"])


def test_every_alert_is_explained_and_has_a_severity_and_a_summary() -> None:
    for name, rule in rules("alert").items():
        assert f"| `{name}` |" in DOCS.read_text()
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")


GOOD = {
    'up{job="mergecore",instance="a"}': "1x3000",
    'mergecore_queue_jobs{job="mergecore",instance="a"}': "3x3000",
    'mergecore_running_jobs{job="mergecore",instance="a"}': "1x3000",
    'mergecore_paused{job="mergecore",instance="a"}': "0x3000",
    'mergecore_read_bytes_total{job="mergecore",instance="a"}': "0+100x3000",
    'mergecore_written_bytes_total{job="mergecore",instance="a"}': "0+0x3000",
    'mergecore_filesystem_free_bytes{job="mergecore",instance="a",folder="outputs"}': "50x3000",
    'mergecore_filesystem_size_bytes{job="mergecore",instance="a",folder="outputs"}': "100x3000",
    'mergecore_worker_resident_bytes{job="mergecore",instance="a"}': "10x3000",
    'mergecore_memory_limit_bytes{job="mergecore",instance="a"}': "100x3000",
    'mergecore_jobs_total{job="mergecore",instance="a",state="done",method="linear"}': "0+1x3000",
    'mergecore_jobs_total{job="mergecore",instance="a",state="failed",method="linear"}': "0x3000",
    'mergecore_jobs_total{job="mergecore",instance="a",state="interrupted",method="linear"}': "0+0x3000",
}
"""One sample a minute of a daemon that is well."""


def series(name: str, state: str = "") -> str:
    return next(one for one in GOOD if one.startswith(name + "{") and state in one)


CASES: dict[str, tuple[dict[str, str], str, str]] = {
    # alert: what is different, when it does not fire yet, when it does
    "MergecoreDown": ({series("up"): "0x3000"}, "1m", "3m"),
    "MergecoreJobFailed": ({series("mergecore_jobs_total", "failed"): "0x30 1x3000"}, "30m", "32m"),
    "MergecoreQueueStuck": ({series("mergecore_running_jobs"): "0x3000"}, "9m", "11m"),
    "MergecoreNoProgress": ({series("mergecore_read_bytes_total"): "100x3000"}, "4m", "25m"),
    "MergecoreWorkersDie": ({series("mergecore_jobs_total", "interrupted"): "0x10 3x3000"}, "9m", "12m"),
    "MergecoreDiskNearlyFull": ({series("mergecore_filesystem_free_bytes"): "4x3000"}, "4m", "6m"),
    "MergecoreWorkerMemory": ({series("mergecore_worker_resident_bytes"): "95x3000"}, "4m", "6m"),
    "MergecorePaused": ({series("mergecore_paused"): "1x3000"}, "23h", "25h"),
}


def test_every_alert_fires_when_it_should_and_no_other_does(tmp_path: Path) -> None:
    assert set(CASES) == set(rules("alert"))
    tests = []
    for alert, (changed, before, after) in CASES.items():
        samples = [{"series": name, "values": changed.get(name, values)} for name, values in GOOD.items()]
        for moment, fires in ((before, False), (after, True)):
            count = f'count(ALERTS{{alertstate="firing",alertname="{alert}"}}) or vector(0)'
            others = f'count(ALERTS{{alertstate="firing",alertname!="{alert}"}}) or vector(0)'
            tests.append(
                {
                    "interval": "1m",
                    "input_series": samples,
                    "promql_expr_test": [
                        {"expr": count, "eval_time": moment, "exp_samples": [{"labels": "{}", "value": int(fires)}]},
                        {"expr": others, "eval_time": moment, "exp_samples": [{"labels": "{}", "value": 0}]},
                    ],
                }
            )
    healthy = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in GOOD.items()],
        "promql_expr_test": [
            {"expr": "count(ALERTS) or vector(0)", "eval_time": "24h", "exp_samples": [{"labels": "{}", "value": 0}]},
            {
                "expr": "mergecore:filesystem_free:ratio",
                "eval_time": "10m",
                "exp_samples": [
                    {
                        "labels": 'mergecore:filesystem_free:ratio{job="mergecore",instance="a",folder="outputs"}',
                        "value": 0.5,
                    }
                ],
            },
        ],
    }
    file = tmp_path / "rules_test.yml"
    file.write_text(
        yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [healthy, *tests]})
    )
    promtool("test", "rules", file)


# --- the dashboard ---


def queries() -> list[str]:
    dashboard = json.loads((DEPLOY / "dashboard.json").read_text())
    variables = [one["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]] + [
        re.sub(r"label_values\((\w+), \w+\)", r"\1", query) for query in variables
    ]


def test_every_query_of_the_dashboard_names_metrics_that_the_daemon_or_a_rule_makes() -> None:
    known = exported() | set(rules("record"))
    assert len(queries()) > 10
    for query in queries():
        names = metric_names(query)
        assert names, query
        assert names <= known, query


def test_promtool_can_read_every_query_of_the_dashboard(tmp_path: Path) -> None:
    file = tmp_path / "queries.yml"
    records = [{"record": f"query_{i}", "expr": query.replace("$instance", ".*")} for i, query in enumerate(queries())]
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": records}]}))
    promtool("check", "rules", file)


def test_panels_of_the_dashboard_have_titles_and_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "dashboard.json").read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["title"] for panel in panels}) == len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.parametrize("folder", ["spool", "outputs"])
def test_a_daemon_tells_the_free_space_of_its_folders(tmp_path: Path, folder: str) -> None:
    with running_daemon(tmp_path) as daemon:
        free = daemon.metric(f'mergecore_filesystem_free_bytes{{folder="{folder}"}}')
        size = daemon.metric(f'mergecore_filesystem_size_bytes{{folder="{folder}"}}')
        assert free is not None
        assert size is not None
        assert 0 < free < size
        assert (daemon.metric("mergecore_memory_limit_bytes") or 0) > 1 << 28
