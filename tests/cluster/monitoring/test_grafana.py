"""Dashboards and alert rules: those in the repository are the ones of the registry, and Prometheus can read them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from kit import REPOSITORY
from ray.dashboard.modules.metrics.grafana_dashboard_factory import generate_train_grafana_dashboard
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from watched import PROMETHEUS_DIR, names_in, promtool

from cluster.monitoring.alerts import alerts
from cluster.monitoring.grafana import dashboard_json, dashboards, write_grafana
from roclip.metrics.series import SERIES

COMMITTED = REPOSITORY / "configs" / "cluster"
ALERTS_TEST = Path(__file__).parent / "alerts_test.yml"
NOT_SHOWN = {"roclip_pool_poisons_seen_samples", "roclip_pool_poisons_met_samples"}
"""Known only where an attack was staged."""
RAYS_OWN = {f"ray_{name}" for name in (*METRICS_GAUGES, "tasks", "actors")}


def queries() -> list[str]:
    of_panels = [query.expr for board in dashboards() for panel in board.panels for query in panel.queries]
    return [*of_panels, *(alert.expr for alert in alerts())]


def test_committed_files_are_those_of_the_registry(tmp_path):
    for written in write_grafana(tmp_path):
        committed = COMMITTED / written.relative_to(tmp_path)
        assert committed.read_text() == written.read_text(), (
            "run `python -m cluster.monitoring.grafana configs/cluster`"
        )
    names = sorted(path.name for path in (COMMITTED / "grafana").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "grafana").iterdir())


def test_every_series_is_shown_and_every_query_asks_for_one():
    asked = names_in(" ".join(queries()))
    ours = {series.exposed: series.name for series in SERIES.values()}
    assert {ours[name] for name in asked & set(ours)} == set(SERIES) - NOT_SHOWN
    assert asked - set(ours) <= RAYS_OWN


def test_names_follow_the_rules_of_prometheus():
    for series in SERIES.values():
        assert re.fullmatch(r"roclip_(ingest|data|train|pool|filter|checkpoint|oracle|run)_[a-z0-9_]+", series.name)
        assert not series.name.endswith(("_total", "_count", "_sum", "_s", "_frac"))
        assert series.labels[0] == "run"
    text = ""
    for series in SERIES.values():
        labels = ",".join(f'{label}="x"' for label in series.labels)
        text += f"# HELP {series.exposed} {series.help}\n# TYPE {series.exposed} {series.kind}\n"
        text += f"{series.exposed}{{{labels}}} 1\n"
    assert promtool("check", "metrics", stdin=text) == ""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray leaves a file of its own open
def test_dashboards_have_the_shape_of_rays_own():
    ray = json.loads(generate_train_grafana_dashboard()[0])
    rays_panels = [panel for row in ray["panels"] for panel in (row.get("panels") or [row]) if "targets" in panel]
    for board in dashboards():
        ours = dashboard_json(board)
        assert {"uid", "title", "tags", "schemaVersion", "templating", "annotations", "panels"} <= set(ours) & set(ray)
        source = next(variable for variable in ours["templating"]["list"] if variable["type"] == "datasource")
        assert source["name"] == "datasource"  # what Ray's dashboard sets in the pages that it embeds
        assert [panel["id"] for panel in ours["panels"]] == list(range(1, len(ours["panels"]) + 1))
        places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in ours["panels"]}
        assert len(places) == len(ours["panels"])
        for panel in ours["panels"]:
            assert {"id", "title", "gridPos", "targets", "fieldConfig", "datasource"} <= set(panel) & set(
                rays_panels[0]
            )
            assert {"expr", "legendFormat", "refId"} <= set(panel["targets"][0]) & set(rays_panels[0]["targets"][0])


@pytest.mark.parametrize("part", ["training", "pool"])
def test_matched_epochs_are_shaded_in_every_panel_of_a_training(part):
    board = json.loads((COMMITTED / "grafana" / f"roclip-{part}.json").read_text())
    (annotation,) = board["annotations"]["list"]
    assert annotation["enable"]
    assert annotation["expr"].endswith('(ray_roclip_train_matched{run=~"$run", arm=~"$arm"}) == 1')


def test_promtool_reads_rules_and_scrape_config():
    rules = promtool("check", "rules", str(PROMETHEUS_DIR / "alerts.yml"))
    assert f"SUCCESS: {len(alerts())} rules found" in rules
    assert "SUCCESS" in promtool("check", "config", str(PROMETHEUS_DIR / "prometheus.yml"))


def test_each_alert_fires_when_it_should_and_only_then(tmp_path):
    tested = {test["name"] for test in yaml.safe_load(ALERTS_TEST.read_text())["tests"]}
    assert tested == {alert.name for alert in alerts()}
    for file in (ALERTS_TEST, PROMETHEUS_DIR / "alerts.yml"):
        shutil.copy(file, tmp_path)
    assert "SUCCESS" in promtool("test", "rules", str(tmp_path / ALERTS_TEST.name))


def test_unit_tests_of_the_alerts_notice_a_rule_that_never_fires(tmp_path):
    shutil.copy(ALERTS_TEST, tmp_path)
    rules = yaml.safe_load((PROMETHEUS_DIR / "alerts.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["expr"] = "vector(1) > 2"
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    with pytest.raises(AssertionError, match="FAILED"):
        promtool("test", "rules", str(tmp_path / ALERTS_TEST.name))
