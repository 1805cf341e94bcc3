"""Schemas of objects that are not Kubernetes' own, and of files that programs in pods read: with the fields used here.

Written from the published definitions that each names. No schema allows a field that is not listed, so a misspelt field
is an error; what the definitions offer beyond these fields is left out.
"""

from typing import Any

import jsonschema

Schema = dict[str, Any]

_NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
_DOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_GROUP: Schema = {"type": "string", "pattern": rf"^$|^{_DOMAIN}$", "maxLength": 253}
_PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
_LABELS: Schema = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"},
}
_DURATION: Schema = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}


def _fields(required: str = "", **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(items: Schema, most: int, least: int = 1) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _object(spec: Schema) -> Schema:
    metadata = _fields("name", name=_NAME, namespace=_NAME, labels=_LABELS)
    return _fields(
        "apiVersion kind metadata spec",
        apiVersion={"type": "string"},
        kind={"type": "string"},
        metadata=metadata,
        spec=spec,
    )


# kubernetes-sigs/gateway-api-inference-extension 1.5.0, api/v1 and its reference of InferencePool
_POOL = _fields(
    "selector targetPorts endpointPickerRef",
    selector=_fields("matchLabels", matchLabels=_LABELS),
    targetPorts=_list(_fields("number", number=_PORT), 8),
    appProtocol={"enum": ["http", "kubernetes.io/h2c"]},
    endpointPickerRef=_fields(
        "name port",  # the port may be left out only where the kind is not Service
        group=_GROUP,
        kind={"type": "string"},
        name=_NAME,
        port=_fields("number", number=_PORT),
        failureMode={"enum": ["FailOpen", "FailClose"]},
    ),
)

# llm-d/llm-d-router, config/crd/bases/llm-d.ai_inferenceobjectives.yaml
_OBJECTIVE = _fields(
    "poolRef",
    poolRef=_fields("name", group=_GROUP, kind={"type": "string"}, name=_NAME),
    priority={"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
)

# kubernetes-sigs/gateway-api 1.x, config/crd/standard
_HOST: Schema = {"type": "string", "pattern": rf"^(\*\.)?{_DOMAIN}$", "minLength": 1, "maxLength": 253}
_GATEWAY = _fields(
    "gatewayClassName listeners",
    gatewayClassName={"type": "string", "minLength": 1},
    listeners=_list(
        _fields(
            "name port protocol",
            name=_NAME,
            hostname=_HOST,
            port=_PORT,
            protocol={"enum": ["HTTP", "HTTPS", "TLS", "TCP", "UDP"]},
            tls={"type": "object"},
            allowedRoutes=_fields(namespaces=_fields(**{"from": {"enum": ["All", "Selector", "Same"]}})),
        ),
        64,
    ),
)
_ROUTE = _fields(
    parentRefs=_list(_fields("name", group=_GROUP, name=_NAME, namespace=_NAME, sectionName=_NAME, port=_PORT), 32),
    hostnames=_list(_HOST, 16),
    rules=_list(
        _fields(
            matches=_list(
                _fields(
                    path=_fields(
                        type={"enum": ["Exact", "PathPrefix", "RegularExpression"]},
                        value={"type": "string", "pattern": "^/", "maxLength": 1024},
                    ),
                    method={"enum": ["GET", "HEAD", "POST", "DELETE", "OPTIONS"]},
                ),
                64,
            ),
            backendRefs=_list(
                _fields("name", group=_GROUP, kind={"type": "string"}, name=_NAME, namespace=_NAME, port=_PORT), 16
            ),
            timeouts=_fields(request=_DURATION, backendRequest=_DURATION),
        ),
        16,
    ),
)

# prometheus-operator, monitoring.coreos.com_podmonitors.yaml
_MONITOR = _fields(
    "selector podMetricsEndpoints",
    selector=_fields(matchLabels=_LABELS),
    podMetricsEndpoints=_list(
        _fields(
            port={"type": "string"}, path={"type": "string"}, interval=_DURATION, scheme={"enum": ["http", "https"]}
        ),
        64,
    ),
)

OBJECTS: dict[tuple[str, str], Schema] = {
    ("inference.networking.k8s.io/v1", "InferencePool"): _object(_POOL),
    ("llm-d.ai/v1alpha2", "InferenceObjective"): _object(_OBJECTIVE),
    ("gateway.networking.k8s.io/v1", "Gateway"): _object(_GATEWAY),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _object(_ROUTE),
    ("monitoring.coreos.com/v1", "PodMonitor"): _object(_MONITOR),
}

# llm-d/llm-d-router 0.10, its reference of EndpointPickerConfig and docs/plugin-metric-protocol.md.
# Each scorer with the metrics of vLLM that it reads.
SCORERS: dict[str, tuple[str, ...]] = {
    "queue-scorer": ("vllm:num_requests_waiting",),
    "running-requests-size-scorer": ("vllm:num_requests_running",),
    "kv-cache-utilization-scorer": ("vllm:kv_cache_usage_perc",),
    "prefix-cache-scorer": ("vllm:cache_config_info",),
    "lora-affinity-scorer": ("vllm:lora_requests_info",),
}
_PLUGINS = [*SCORERS, "metrics-data-source", "core-metrics-extractor", "max-score-picker", "weighted-random-picker"]
PICKER = _fields(
    "apiVersion kind plugins schedulingProfiles",
    apiVersion={"const": "llm-d.ai/v1alpha1"},
    kind={"const": "EndpointPickerConfig"},
    featureGates=_list({"enum": ["flowControl"]}, 1),
    plugins=_list(_fields("type", type={"enum": _PLUGINS}, name={"type": "string"}, parameters={"type": "object"}), 64),
    schedulingProfiles=_list(
        _fields(
            "name plugins",
            name={"type": "string"},
            plugins=_list(
                _fields("pluginRef", pluginRef={"type": "string"}, weight={"type": "number", "exclusiveMinimum": 0}), 64
            ),
        ),
        8,
    ),
)

# kubernetes-sigs/gateway-api-inference-extension, tools/dynamic-lora-sidecar/README.md
_MODELS = _fields(
    "models",
    models=_list(
        _fields("id source", id={"type": "string"}, source={"type": "string"}, **{"base-model": {"type": "string"}}),
        1000,
        least=0,
    ),
)
SYNCER = _fields(
    "vLLMLoRAConfig",
    vLLMLoRAConfig=_fields(
        name={"type": "string"},
        host={"type": "string"},
        port=_PORT,
        defaultBaseModel={"type": "string"},
        ensureExist=_MODELS,
        ensureNotExist=_MODELS,
    ),
)


def check(value: Any, schema: Schema) -> None:
    """jsonschema.ValidationError unless the value is as its schema says."""
    jsonschema.Draft202012Validator(schema).validate(value)
