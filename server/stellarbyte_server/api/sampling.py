"""Makes the engine's sampling parameters from a request's fields and the model's defaults, which share names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stellarbyte_server.api.contract.bodies.fields import OF_MODEL
from stellarbyte_server.api.contract.bodies.generation import GenerationBody
from stellarbyte_server.protocol.request import SamplingParams
from stellarbyte_server.tokens.tokenizer import read_json

_LEAST_TOP_P = 1e-9  # below the probability of any likeliest token, so that only this token is kept
_NEUTRAL = SamplingParams(max_tokens=0, seed=0)
_OF_MODEL = tuple(name for name, field in GenerationBody.model_fields.items() if OF_MODEL in field.metadata)
_OF_BODY = tuple(name for name in SamplingParams.__struct_fields__ if name in GenerationBody.model_fields)


def read_defaults(model_path: Path) -> dict[str, Any]:
    """The sampling defaults in the model's generation_config.json.

    Read as by transformers: any value that disables a filter does so here, and `do_sample: false` is a temperature
    of 0.

    Raises:
        ValueError: the file or a value is invalid.
    """
    file = model_path / "generation_config.json"
    config = read_json(file)
    defaults: dict[str, Any] = {}
    for name in _OF_MODEL:
        value = config.get(name)
        if value is None or _is_off(name, value):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ValueError(f"{file}: {name} must be a number ≥ 0, not {value!r}")
        if name == "repetition_penalty" and value == 0:
            raise ValueError(f"{file}: {name} must be > 0, because logits are divided by it")
        defaults[name] = type(getattr(_NEUTRAL, name))(value)
    if config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults


def _is_off(name: str, value: object) -> bool:
    """Whether a value keeps all tokens: ≤ 0 for top_k and min_p, ≥ 1 for top_p."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return (name in ("top_k", "min_p") and value <= 0) or (name == "top_p" and value >= 1)


def sampling_params(body: GenerationBody, defaults: Mapping[str, Any], **computed: Any) -> SamplingParams:
    """The body's fields, else the model's defaults, else those of SamplingParams; `computed` overrides all."""
    given = {name: value for name in _OF_BODY if (value := getattr(body, name)) is not None}
    params = {**defaults, **given, **computed}
    if params.get("top_p") == 0:
        params["top_p"] = _LEAST_TOP_P
    return SamplingParams(**params)
