"""Prometheus' rules and Grafana's dashboard: of metrics that exist, connected with each other."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deployment.files import DOCKER, read_yaml
from tests.support.metric_names import BY_ENGINE, COUNTERS, GAUGES, HISTOGRAMS, series_in, wrong_with
from tests.support.servers.server_process import ROOT

ALERTS = DOCKER / "prometheus" / "alerts.yml"
DASHBOARD = json.loads((DOCKER / "grafana" / "stellarbyte.json").read_text())


def rules() -> list[dict[str, Any]]:
    (document,) = read_yaml(ALERTS)
    return [rule for group in document["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """Each panel's title with each of its expressions."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def test_an_expression_is_checked_by_what_the_metrics_are() -> None:
    for expression in (
        "rate(vllm:num_requests_waiting[5m])",
        "vllm:generation_tokens_total > 5",
        "rate(vllm:tokens_total[5m])",
        "rate(vllm:time_to_first_token_seconds[5m])",
        "sum by (tier) (vllm:num_requests_running)",
        'stellarbyte:adapter_resident{teir="gpu"}',
    ):
        assert wrong_with(expression), expression


def test_every_alert_is_of_metrics_that_exist() -> None:
    for rule in rules():
        assert wrong_with(rule["expr"]) == [], rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"]["summary"]


def test_every_panel_is_of_metrics_that_exist() -> None:
    for title, expression in queries():
        assert series_in(expression) and wrong_with(expression) == [], title


def test_the_dashboard_leaves_out_no_metric() -> None:
    shown = {name for _, expression in queries() for name in series_in(expression)}
    for_routers = {
        "vllm:lora_requests_info", "vllm:cache_config_info", "vllm:lora_adapter_loaded",
        "vllm:lora_adapter_load_seconds_bucket",  # is stellarbyte:adapter_load_seconds
    }  # fmt: skip
    assert shown - BY_ENGINE == (GAUGES | COUNTERS | {f"{name}_bucket" for name in HISTOGRAMS}) - for_routers


def test_the_dashboard_asks_the_data_source_that_is_provisioned() -> None:
    (document,) = read_yaml(DOCKER / "grafana" / "datasources.yaml")
    (source,) = document["datasources"]
    wanted = {"type": source["type"], "uid": source["uid"]}
    asked = [panel["datasource"] for panel in panels()]
    asked += [target["datasource"] for panel in panels() for target in panel["targets"]]
    asked += [variable["datasource"] for variable in DASHBOARD["templating"]["list"]]
    asked += [annotation["datasource"] for annotation in DASHBOARD["annotations"]["list"]]
    assert asked and all(each == wanted for each in asked)


def test_panels_have_ids_of_their_own_and_follow_every_choice() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    for title, expression in queries():
        for name in variables:
            assert f'=~"${name}"' in expression, f"{title} does not follow the choice of {name}"


@pytest.mark.parametrize(
    "command",
    [
        ("check", "config", "docker/prometheus/prometheus.yml"),
        ("test", "rules", "tests/deployment/alerts.test.yml"),
    ],
    ids=["check config", "test rules"],
)
def test_promtool_agrees(command: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (on Debian: apt-get install prometheus)")
    result = subprocess.run([promtool, *command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_is_tested() -> None:
    (document,) = read_yaml(ROOT / "tests" / "deployment" / "alerts.test.yml")
    expected = json.dumps([each["promql_expr_test"] for each in document["tests"]])
    for rule in rules():
        assert rule["alert"] in expected
