"""The manifests of an inference gateway: valid by published schemas, in agreement with the server and each other."""

import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from stellarbyte_server.api.endpoints import OPERATIONS
from stellarbyte_server.config.command_line import parse_settings
from tests.deployment import custom_schemas
from tests.deployment.files import DOCKER, image_environment
from tests.deployment.kustomize import build, find
from tests.support.metric_names import SERIES
from tests.support.servers.server_process import ROOT

FOLDER = DOCKER / "kubernetes" / "gateway"
VERSIONS = ("1.30", "1.37")  # oldest and newest that the manifests are written for
OBJECTS = build(FOLDER)
DEPLOYMENT = find(OBJECTS, "Deployment")
POD = DEPLOYMENT["spec"]["template"]
(SERVER,) = POD["spec"]["containers"]
(SYNCER,) = POD["spec"]["initContainers"]
PICKER_POD = find(OBJECTS, "Deployment", "stellarbyte-picker")["spec"]["template"]
(PICKER,) = PICKER_POD["spec"]["containers"]
POOL = find(OBJECTS, "InferencePool")["spec"]
(RULE,) = find(OBJECTS, "HTTPRoute")["spec"]["rules"]
PLUGINS = yaml.safe_load(find(OBJECTS, "ConfigMap", "stellarbyte-picker")["data"]["plugins.yaml"])
ADAPTERS = yaml.safe_load(find(OBJECTS, "ConfigMap", "stellarbyte-adapters")["data"]["configmap.yaml"])
SETTINGS = find(OBJECTS, "ConfigMap")["data"]
PATHS = {path for _, path in OPERATIONS}


def name_of(each: dict[str, Any]) -> str:
    return f"{each['kind']} {each['metadata']['name']}"


def custom(each: dict[str, Any]) -> custom_schemas.Schema | None:
    return custom_schemas.OBJECTS.get((each["apiVersion"], each["kind"]))


def server_settings(**environment: str) -> Any:
    return parse_settings([], image_environment("cuda") | SETTINGS | environment)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("each", [each for each in OBJECTS if custom(each) is None], ids=name_of)
def test_kubernetes_objects_are_valid_by_its_own_schemas(each: dict[str, Any], version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    validate.validate(each, version, strict=True)


@pytest.mark.parametrize("each", [each for each in OBJECTS if custom(each) is not None], ids=name_of)
def test_other_objects_are_valid_by_their_published_schemas(each: dict[str, Any]) -> None:
    custom_schemas.check(each, custom(each) or {})


def test_a_misspelt_field_of_each_other_object_would_be_found() -> None:
    found = [each for each in OBJECTS if custom(each) is not None]
    assert {each["kind"] for each in found} == {"InferencePool", "InferenceObjective", "Gateway", "HTTPRoute"}
    for each in found:
        with pytest.raises(jsonschema.ValidationError):
            custom_schemas.check(each | {"spec": each["spec"] | {"selectr": {}}}, custom(each) or {})


def test_the_pod_monitor_is_valid_by_its_published_schema() -> None:
    (monitor,) = build(DOCKER / "kubernetes" / "prometheus")
    custom_schemas.check(monitor, custom(monitor) or {})


def kubectl_kustomize(folder: Path) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    command = ["kubectl", "kustomize", folder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("folder", ["base", "cpu", "prometheus", "gateway"])
def test_kubectl_builds_the_same_objects(folder: str) -> None:
    """kustomize names generated ConfigMaps with a hash, and names them so wherever they are referred to."""
    built = kubectl_kustomize(DOCKER / "kubernetes" / folder)
    text = re.sub(r"\b(stellarbyte(?:-picker)?)-[0-9a-z]{10}\b", r"\1", built)
    theirs = {name_of(each): each for each in yaml.safe_load_all(text)}
    ours = {name_of(each): each for each in build(DOCKER / "kubernetes" / folder)}
    assert theirs == ours


def test_the_pool_is_the_servers_pods_and_not_the_picker() -> None:
    labels = POOL["selector"]["matchLabels"].items()
    assert labels and labels <= POD["metadata"]["labels"].items()
    assert not labels <= PICKER_POD["metadata"]["labels"].items()
    assert [port["number"] for port in POOL["targetPorts"]] == [server_settings().port]
    for kind in ("Deployment", "Service"):
        selector = find(OBJECTS, kind)["spec"]["selector"]
        assert not selector.get("matchLabels", selector).items() <= PICKER_POD["metadata"]["labels"].items()


def test_the_gateway_finds_the_picker() -> None:
    service = find(OBJECTS, "Service", POOL["endpointPickerRef"]["name"])["spec"]
    (port,) = service["ports"]
    assert port["port"] == POOL["endpointPickerRef"]["port"]["number"]
    assert service["selector"].items() <= PICKER_POD["metadata"]["labels"].items()
    ports = {each["name"]: each["containerPort"] for each in PICKER["ports"]}
    arguments = dict(each.removeprefix("--").split("=", 1) for each in PICKER["args"])
    assert ports[port["targetPort"]] == int(arguments["grpc-port"])
    assert {PICKER[probe]["grpc"]["port"] for probe in ("livenessProbe", "readinessProbe")} == {ports["grpc-health"]}
    assert ports["grpc-health"] == int(arguments["grpc-health-port"])


def test_the_picker_watches_the_pool_and_may_do_so() -> None:
    arguments = dict(each.removeprefix("--").split("=", 1) for each in PICKER["args"])
    pool = find(OBJECTS, "InferencePool", arguments["pool-name"])
    group = pool["apiVersion"].split("/")[0]
    assert arguments["pool-group"] == group and arguments["pool-namespace"] == "$(NAMESPACE)"
    assert {each["name"] for each in PICKER["env"]} == {"NAMESPACE", "POD_NAME"}
    role, binding = find(OBJECTS, "Role", "stellarbyte-picker"), find(OBJECTS, "RoleBinding", "stellarbyte-picker")
    watched = {
        (rule_group, name) for rule in role["rules"] for rule_group in rule["apiGroups"] for name in rule["resources"]
    }
    assert watched >= {("", "pods"), (group, "inferencepools"), ("llm-d.ai", "inferenceobjectives")}
    assert all(rule["verbs"] == ["get", "list", "watch"] for rule in role["rules"])
    account = find(OBJECTS, "ServiceAccount", PICKER_POD["spec"]["serviceAccountName"])
    (subject,) = binding["subjects"]
    assert subject["name"] == account["metadata"]["name"]
    assert subject["namespace"]  # Kubernetes refuses it without
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def test_the_pickers_plugins_are_its_own_and_read_metrics_that_the_server_has() -> None:
    custom_schemas.check(PLUGINS, custom_schemas.PICKER)
    types = {plugin["type"]: plugin for plugin in PLUGINS["plugins"]}
    (profile,) = PLUGINS["schedulingProfiles"]
    used = {each["pluginRef"]: each.get("weight") for each in profile["plugins"]}
    assert used.keys() <= types.keys()
    scorers = used.keys() & custom_schemas.SCORERS.keys()
    wanted = {"queue-scorer", "kv-cache-utilization-scorer", "prefix-cache-scorer", "lora-affinity-scorer"}
    assert scorers == wanted and all(used[name] for name in scorers)
    assert {metric for name in scorers for metric in custom_schemas.SCORERS[name]} <= SERIES
    assert types["metrics-data-source"]["parameters"]["path"] in PATHS
    volumes = {each["name"]: each for each in PICKER_POD["spec"]["volumes"]}
    (mount,) = PICKER["volumeMounts"]
    assert f"--config-file={mount['mountPath']}/plugins.yaml" in PICKER["args"]
    assert volumes[mount["name"]]["configMap"]["name"] == "stellarbyte-picker"


def test_the_route_leads_to_the_pool_by_paths_that_exist() -> None:
    (backend,) = RULE["backendRefs"]
    pool = find(OBJECTS, "InferencePool", backend["name"])
    assert (f"{backend['group']}/v1", backend["kind"]) == (pool["apiVersion"], pool["kind"])
    (parent,) = find(OBJECTS, "HTTPRoute")["spec"]["parentRefs"]
    find(OBJECTS, "Gateway", parent["name"])
    matched = set()
    for match in RULE["matches"]:
        wanted = match["path"]
        if wanted["type"] == "Exact":
            assert wanted["value"] in PATHS
            matched.add(wanted["value"])
        else:
            matched |= {path for path in PATHS if path.startswith(wanted["value"] + "/")}
    assert matched >= {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize"}
    assert not matched & {"/metrics", "/health", "/ready", "/version"}
    assert RULE["timeouts"]["request"] == "0s"  # an answer may take any time


def test_without_keys_the_routes_host_names_and_the_services_are_answered() -> None:
    names = [each["name"] for each in SERVER["env"]]
    assert names.index("POD_NAMESPACE") < names.index("STELLARBYTE_ALLOWED_HOST")  # or $(POD_NAMESPACE) would stay
    value = SERVER["env"][names.index("STELLARBYTE_ALLOWED_HOST")]["value"].replace("$(POD_NAMESPACE)", "models")
    allowed = set(server_settings(STELLARBYTE_ALLOWED_HOST=value).allowed_host)
    assert allowed >= {*find(OBJECTS, "HTTPRoute")["spec"]["hostnames"], "stellarbyte", "stellarbyte.models.svc"}


def test_objectives_are_of_the_pool_and_lead_in_both_directions() -> None:
    objectives = [each["spec"] for each in OBJECTS if each["kind"] == "InferenceObjective"]
    assert {each["poolRef"]["name"] for each in objectives} == {find(OBJECTS, "InferencePool")["metadata"]["name"]}
    assert min(each["priority"] for each in objectives) < 0 < max(each["priority"] for each in objectives)


def test_the_picker_may_do_no_more_than_it_must() -> None:
    security = PICKER_POD["spec"]["securityContext"]
    assert security["runAsNonRoot"] is True and security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert PICKER["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_kubectl_builds_the_documents_overlay(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    overlay, adapters, added = map(textwrap.dedent, re.findall(r"^ *```yaml\n(.*?)```", text, re.MULTILINE | re.DOTALL))
    (tmp_path / "kustomization.yaml").write_text(overlay + added)
    (tmp_path / "adapters.yaml").write_text(adapters)
    custom_schemas.check(yaml.safe_load(adapters), custom_schemas.SYNCER)
    shutil.copytree(DOCKER / "kubernetes", tmp_path / "stellarbyte" / "docker" / "kubernetes")
    objects = list(yaml.safe_load_all(kubectl_kustomize(tmp_path)))
    assert find(objects, "Gateway")["spec"]["gatewayClassName"] == "agentgateway"
    assert find(objects, "HTTPRoute")["spec"]["hostnames"] == ["llm.mycompany.example"]
    assert find(objects, "InferencePool")["metadata"]["namespace"] == "models"
    assert find(objects, "RoleBinding", "stellarbyte-picker")["subjects"][0]["namespace"] == "models"
    image = find(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == "registry.example.com/stellarbyte-server:0.2.0"
    assert find(objects, "ConfigMap", "stellarbyte-adapters")["data"] == {"configmap.yaml": adapters}
    (settings,) = [each["data"] for each in objects if "STELLARBYTE_MODEL" in each.get("data", {})]
    assert settings == SETTINGS | {"STELLARBYTE_ADAPTER_SOURCE": "hf://my-org"}
    parse_settings([], image_environment("cuda") | settings)


def test_the_documents_table_is_the_plugins() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    shown = dict(re.findall(r"^\| `([a-z-]+-scorer)` \| (\d+) \|", text, re.MULTILINE))
    (profile,) = PLUGINS["schedulingProfiles"]
    assert shown == {each["pluginRef"]: str(each["weight"]) for each in profile["plugins"] if "weight" in each}


def test_the_syncer_reads_a_file_of_its_form() -> None:
    custom_schemas.check(ADAPTERS, custom_schemas.SYNCER)
    assert SYNCER["restartPolicy"] == "Always"  # or the server would wait for its end
    volumes = {each["name"]: each for each in POD["spec"]["volumes"]}
    (mount,) = SYNCER["volumeMounts"]
    assert "subPath" not in mount and volumes[mount["name"]]["configMap"] == {"name": "stellarbyte-adapters"}
    (variable,) = SYNCER["env"]
    assert variable == {"name": "DYNAMIC_LORA_ROLLOUT_CONFIG", "value": f"{mount['mountPath']}/configmap.yaml"}


def test_the_syncer_calls_the_address_for_operators_by_the_models_name() -> None:
    settings, file = server_settings(), ADAPTERS["vLLMLoRAConfig"]
    assert settings.admin_listen == (file["host"], file["port"])
    assert file["port"] not in [port["number"] for port in POOL["targetPorts"]]
    assert file["defaultBaseModel"] == settings.model_name
    assert PATHS >= {"/health", "/v1/models", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}


def test_the_syncer_may_do_no_more_than_it_must() -> None:
    security = SYNCER["securityContext"]
    assert security["readOnlyRootFilesystem"] is True and security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
