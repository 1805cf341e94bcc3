"""compose.yaml: a server that may write to its volume and /tmp only, and a Prometheus and a Grafana that find it."""

from typing import Any

import yaml

from stellarbyte_server.config.command_line import parse_settings
from stellarbyte_server.config.settings import ServerSettings
from tests.deployment.files import DOCKER, image_environment, read_dockerfile, read_yaml
from tests.support.servers.server_process import ROOT


class ComposeLoader(yaml.SafeLoader):
    """Knows Compose's own tag, which takes away what the file below set."""


ComposeLoader.add_constructor("!reset", lambda *_: None)

(COMPOSE,) = read_yaml(DOCKER / "compose.yaml")
SERVER = COMPOSE["services"]["server"]


def mounts(service: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(volume.split(":")[:2]) for volume in service["volumes"]]


def test_every_file_that_is_mounted_exists_and_every_volume_is_declared() -> None:
    for service in COMPOSE["services"].values():
        for source, target in mounts(service):
            assert target.startswith("/")
            assert (DOCKER / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], source
    assert (DOCKER / SERVER["build"]["context"]).resolve() == ROOT


def test_the_server_keeps_its_cache_and_can_write_nowhere_else() -> None:
    (volume,) = [each.arguments for each in read_dockerfile() if each.name == "VOLUME"]
    assert mounts(SERVER) == [("cache", volume)]
    assert SERVER["read_only"] is True and SERVER["tmpfs"] == ["/tmp"]
    assert SERVER["cap_drop"] == ["ALL"] and "no-new-privileges:true" in SERVER["security_opt"]


def test_answers_can_end_before_the_server_is_killed() -> None:
    assert int(SERVER["stop_grace_period"].removesuffix("s")) > ServerSettings.shutdown_timeout + 5


def test_the_servers_variables_are_settings_it_takes() -> None:
    parse_settings([], image_environment("cuda") | SERVER["environment"])


def test_without_keys_nothing_is_reached_from_elsewhere() -> None:
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_a_gpu_is_reserved_and_the_cpu_file_takes_it_back() -> None:
    (device,) = SERVER["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and "gpu" in device["capabilities"]
    laid_over = yaml.load((DOCKER / "compose.cpu.yaml").read_text(), ComposeLoader)["services"]
    assert list(laid_over) == ["server"] and laid_over["server"]["deploy"] is None
    assert laid_over["server"]["build"]["args"]["VARIANT"] == "cpu"
    assert laid_over["server"]["image"] != SERVER["image"]  # neither build takes the other's name


def test_prometheus_scrapes_the_server_and_grafana_asks_prometheus() -> None:
    (prometheus,) = read_yaml(DOCKER / "prometheus" / "prometheus.yml")
    targets = {
        job["job_name"]: target
        for job in prometheus["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    }
    settings = parse_settings([], image_environment("cpu") | SERVER["environment"])
    port = settings.port
    assert targets["stellarbyte"] == f"server:{port}"  # the service's name is its host name
    assert "server" in settings.allowed_host
    assert SERVER["ports"] == [f"127.0.0.1:8000:{port}"]
    (grafana,) = read_yaml(DOCKER / "grafana" / "datasources.yaml")
    host, _, port = grafana["datasources"][0]["url"].removeprefix("http://").partition(":")
    assert host in COMPOSE["services"] and COMPOSE["services"][host]["ports"][0].endswith(f":{port}")


def test_grafana_finds_its_files_where_they_are_mounted() -> None:
    grafana = COMPOSE["services"]["grafana"]
    inside = {target: source for source, target in mounts(grafana)}
    (dashboards,) = read_yaml(DOCKER / "grafana" / "dashboards.yaml")
    (provider,) = dashboards["providers"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home in inside and home.startswith(provider["options"]["path"] + "/")
    for kind in ("datasources", "dashboards"):
        assert inside[f"/etc/grafana/provisioning/{kind}/stellarbyte.yaml"] == f"./grafana/{kind}.yaml"
