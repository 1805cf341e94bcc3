"""The Kubernetes manifests: valid by Kubernetes' own schemas, and in agreement with the image and with each other."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from stellarbyte_server.api.routes.health import router
from stellarbyte_server.config.command_line import parse_settings
from stellarbyte_server.engine.start.serving_plan import concurrency_of
from tests.deployment.files import DOCKER, image_environment, read_dockerfile, read_yaml
from tests.support.metric_names import GAUGES
from tests.support.servers.server_process import ROOT

KUBERNETES = DOCKER / "kubernetes"
BASE = KUBERNETES / "base"
VERSIONS = ("1.30", "1.37")  # oldest and newest that the manifests are written for


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The objects that a kustomization lists, by their kind."""
    (kustomization,) = read_yaml(folder / "kustomization.yaml")
    objects = [each for name in kustomization["resources"] for each in read_yaml(folder / name)]
    return {each["kind"]: each for each in objects}


OBJECTS = load(BASE)
(KUSTOMIZATION,) = read_yaml(BASE / "kustomization.yaml")
POD = OBJECTS["Deployment"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
SETTINGS = dict(literal.split("=", 1) for literal in KUSTOMIZATION["configMapGenerator"][0]["literals"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", OBJECTS)
def test_it_is_valid_by_kubernetes_own_schema(kind: str, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    validate.validate(OBJECTS[kind], version, strict=True)  # strict: a field that is misspelt is an error


def test_a_misspelt_field_would_be_found() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    wrong = OBJECTS["PodDisruptionBudget"] | {"spec": {"maxUnavailible": 1}}
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, VERSIONS[-1], strict=True)


def kustomize(folder: Path) -> str:
    """What is applied to the cluster."""
    tools = (["kubectl", "kustomize"], ["kustomize", "build"])
    command = next((words for words in tools if shutil.which(words[0])), None)
    if command is None:
        pytest.skip("neither kubectl nor kustomize is installed")
    result = subprocess.run([*command, folder], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("folder", ["base", "cpu", "prometheus"])
def test_kustomize_builds_it(folder: str) -> None:
    assert ("nvidia.com/gpu" in kustomize(KUBERNETES / folder)) == (folder == "base")


def test_kustomize_builds_the_documents_overlay(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "deployment.md").read_text()
    start = text.index("# kustomization.yaml")
    (tmp_path / "kustomization.yaml").write_text(text[start : text.index("```", start)])
    shutil.copytree(KUBERNETES, tmp_path / "stellarbyte" / "docker" / "kubernetes")
    objects = {each["kind"]: each for each in yaml.safe_load_all(kustomize(tmp_path))}
    assert objects["ConfigMap"]["data"] == SETTINGS | {"STELLARBYTE_MODEL": "/models/qwen3-0.6b"}
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    assert {each["mountPath"] for each in pod["containers"][0]["volumeMounts"]} > {"/models", "/tmp"}
    assert pod["containers"][0]["image"] == "registry.example.com/stellarbyte-server:0.2.0"


def test_every_selector_finds_the_pods() -> None:
    labels = POD["metadata"]["labels"].items()
    for selector in (
        OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"],
        OBJECTS["Service"]["spec"]["selector"],
        OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        POD["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
        load(KUBERNETES / "prometheus")["PodMonitor"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector and selector.items() <= labels
    target = OBJECTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    deployment = OBJECTS["Deployment"]
    assert (target["apiVersion"], target["kind"]) == (deployment["apiVersion"], "Deployment")
    assert target["name"] == deployment["metadata"]["name"]


def test_without_keys_the_names_of_the_service_are_answered() -> None:
    given = {each["name"]: each for each in CONTAINER["env"]}
    assert given["POD_NAMESPACE"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.namespace"
    names = given["STELLARBYTE_ALLOWED_HOST"]["value"].replace("$(POD_NAMESPACE)", "models")
    settings = parse_settings([], image_environment("cuda") | SETTINGS | {"STELLARBYTE_ALLOWED_HOST": names})
    service = OBJECTS["Service"]["metadata"]["name"]
    ends = ("", ".models", ".models.svc", ".models.svc.cluster.local")
    assert settings.allowed_host == tuple(service + end for end in ends)


def test_ports_agree_and_probes_ask_routes_that_exist() -> None:
    (port,) = CONTAINER["ports"]
    settings = parse_settings([], image_environment("cuda") | SETTINGS)
    assert port["containerPort"] == settings.port
    assert POD["metadata"]["annotations"]["prometheus.io/port"] == str(settings.port)
    assert OBJECTS["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    paths = {
        "startupProbe": "/health",
        "livenessProbe": "/health",  # not /ready: a server that drains must not be killed for it
        "readinessProbe": "/ready",
    }
    for probe, path in paths.items():
        assert CONTAINER[probe]["httpGet"] == {"path": path, "port": port["name"]}
    monitor = load(KUBERNETES / "prometheus")["PodMonitor"]["spec"]["podMetricsEndpoints"][0]
    assert monitor["port"] == port["name"]
    scraped = {monitor["path"], POD["metadata"]["annotations"]["prometheus.io/path"]}
    assert {*paths.values(), *scraped} <= {route.path for route in router.routes}


def test_the_pod_may_do_no_more_than_it_must() -> None:
    pod, container = POD["spec"]["securityContext"], CONTAINER["securityContext"]
    (user,) = [each.arguments for each in read_dockerfile() if each.name == "USER"]
    assert pod["runAsNonRoot"] is True and f"{pod['runAsUser']}:{pod['runAsGroup']}" == user
    assert pod["fsGroup"] == pod["runAsGroup"]  # or it could not write to its volumes
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["readOnlyRootFilesystem"] is True and container["allowPrivilegeEscalation"] is False
    assert container["capabilities"] == {"drop": ["ALL"]}
    assert POD["spec"]["automountServiceAccountToken"] is False


def test_it_can_write_to_its_cache_and_to_tmp() -> None:
    (volume,) = [each.arguments for each in read_dockerfile() if each.name == "VOLUME"]
    volumes = {each["name"]: each for each in POD["spec"]["volumes"]}
    mounts = {each["mountPath"]: volumes[each["name"]] for each in CONTAINER["volumeMounts"]}
    assert set(mounts) == {volume, "/tmp"} and all("emptyDir" in each for each in mounts.values())


def test_the_services_name_does_not_become_the_servers_port() -> None:
    """Kubernetes gives pods a variable STELLARBYTE_PORT=tcp://10.… for a service called stellarbyte, if it may."""
    variable = OBJECTS["Service"]["metadata"]["name"].upper().replace("-", "_") + "_PORT"
    assert variable == "STELLARBYTE_PORT" and POD["spec"]["enableServiceLinks"] is False


def test_answers_can_end_before_the_pod_is_killed() -> None:
    command, pause_s = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    settings = parse_settings([], image_environment("cuda") | SETTINGS)
    assert command == "sleep"
    assert POD["spec"]["terminationGracePeriodSeconds"] > int(pause_s) + settings.shutdown_timeout + 10


def test_a_pod_has_one_gpu_and_the_cpu_overlay_none() -> None:
    resources = CONTAINER["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == "1"
    (overlay,) = read_yaml(KUBERNETES / "cpu" / "kustomization.yaml")
    assert "/limits/nvidia.com~1gpu" in overlay["patches"][0]["patch"]
    assert overlay["images"][0]["name"] == CONTAINER["image"] == KUSTOMIZATION["images"][0]["name"]


def test_the_autoscaler_asks_for_metrics_that_the_adapter_serves() -> None:
    (values,) = read_yaml(KUBERNETES / "prometheus" / "adapter-values.yaml")
    (rule,) = values["rules"]["custom"]
    series = re.search(r'__name__=~"([^"]+)"', rule["seriesQuery"])
    assert series is not None
    served = set()
    for name in GAUGES:  # as the adapter does it
        if re.search(series[1], name) and re.search(rule["name"]["matches"], name):
            served.add(re.sub(rule["name"]["matches"], rule["name"]["as"].replace("$", "\\"), name))
    asked = [metric["pods"] for metric in OBJECTS["HorizontalPodAutoscaler"]["spec"]["metrics"]]
    assert asked[0]["metric"]["name"] == "vllm_num_requests_waiting"
    assert {each["metric"]["name"] for each in asked} == served
    assert all(re.fullmatch(r"\w+", name) for name in served)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_autoscaler_keeps_pods_that_are_half_full(device: str) -> None:
    value = OBJECTS["HorizontalPodAutoscaler"]["spec"]["metrics"][1]["pods"]["target"]["averageValue"]
    if device == "cpu":
        (overlay,) = read_yaml(KUBERNETES / "cpu" / "kustomization.yaml")
        (change,) = yaml.safe_load(overlay["patches"][1]["patch"])
        assert change["path"] == "/spec/metrics/1/pods/target/averageValue"
        value = change["value"]
    settings = parse_settings([], image_environment(device) | SETTINGS)
    assert int(value) == concurrency_of(settings.engine, device) // 2
