"""PEFT's adapter_config.json, to and from `LoRAConfig`.

Files are untrusted: a regular expression is run only if its cost is bounded, and a field that would change the outputs
in an unsupported way is refused by name.
"""

import dataclasses
import json
import math
import re
from typing import Any

from stellarbyte.lora.config import LoRAConfig

MAX_REGEX_CHARACTERS = 500
MAX_KEY_CHARACTERS = 200

OUR_FIELDS = tuple(field.name for field in dataclasses.fields(LoRAConfig) if field.init)
# Fields of PEFT's LoraConfig that do not change the outputs: how an adapter was made and its modules were chosen.
NEUTRAL_FIELDS = frozenset(
    "peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode runtime_config "
    "exclude_modules layers_to_transform layers_pattern ensure_weight_tying "
    "init_lora_weights loftq_config eva_config corda_config lora_ga_config "
    "megatron_core qalora_group_size".split()  # the last two are set even without their features
)
# The others (pissa, olora, corda, loftq, lora_ga) also change the base weights; without that the outputs are wrong.
NEUTRAL_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# Names, alternatives and wildcards, not nested, so that the cost of a match is known.
QUICK_KEY = re.compile(
    r"\^?(?:\((?:\?:)?(?:[\w.|-]|\\[.d])+\)|(?:[\w.-]|\\[.dw]|\[[\w-]+\])(?:[*+]\??)?)+\$?"
)  # ( a group                               | an atom, perhaps repeated )
MAX_COST = 50_000  # of all keys of a pattern together; a plain name costs 1


class AdapterError(ValueError):
    """An adapter's files cannot be used. str() is one sentence for the user, with file names and without folders."""


def parse_config(raw: bytes, *, max_rank: int, max_keys: int) -> LoRAConfig:
    """Parse an adapter_config.json; absent fields have PEFT's defaults.

    Args:
        max_rank: largest accepted r, also in rank_pattern.
        max_keys: most entries of rank_pattern or alpha_pattern.

    Raises:
        AdapterError: this is not the config of a plain LoRA adapter; the message does not name the file.
    """
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"it is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError("it must contain a JSON object")
    if content.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type is {content.get('peft_type')!r:.100}, but only 'LORA' is supported")
    for name, value in content.items():
        if name not in OUR_FIELDS and name not in NEUTRAL_FIELDS and value:
            raise AdapterError(f"{name!r:.100} is {value!r:.100}, but only plain LoRA without it is supported")
    start = content.get("init_lora_weights")
    if start not in NEUTRAL_STARTS:
        raise AdapterError(
            f"init_lora_weights is {start!r:.100}, which also changes the base model's weights; "
            "save the adapter as plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    settings = {"r": 8, "lora_alpha": 8, "target_modules": None} | {
        name: content[name] for name in OUR_FIELDS if name in content
    }
    for name in ("rank_pattern", "alpha_pattern"):
        if settings.get(name) is None:
            settings[name] = {}
        elif isinstance(settings[name], dict):
            _check_keys(name, settings[name], max_keys)
    targets = settings["target_modules"]
    if isinstance(targets, str) and len(targets) > MAX_REGEX_CHARACTERS:
        raise AdapterError(f"target_modules must be a regular expression of at most {MAX_REGEX_CHARACTERS} characters")
    try:
        config = LoRAConfig(**settings)
    except ValueError as error:
        raise AdapterError(str(error)) from error
    ranks = [("r", config.r), *((f"rank_pattern[{key!r:.100}]", rank) for key, rank in config.rank_pattern.items())]
    for name, rank in ranks:
        if rank > max_rank:
            raise AdapterError(f"{name} is {rank!r:.100}, but at most {max_rank} is supported")
    return config


def _check_keys(name: str, pattern: dict[str, Any], max_keys: int) -> None:
    if len(pattern) > max_keys:
        raise AdapterError(f"{name} has {len(pattern)} entries, but at most {max_keys} are supported")
    for key in pattern:
        if len(key) > MAX_KEY_CHARACTERS or not QUICK_KEY.fullmatch(key):
            raise AdapterError(
                f"{name} has the key {key!r:.100}, but only names, wildcards and groups of alternatives are supported"
            )
    if sum(map(_cost, pattern)) > MAX_COST:
        raise AdapterError(f"the regular expressions of {name} have more wildcards or alternatives than are supported")


def _cost(key: str) -> int:
    """Roughly the number of ways in which a key can fail to match a name: the choices multiply."""
    wildcards = key.count("*") + key.count("+")
    return 50 ** min(wildcards, 9) * math.prod(group.count("|") + 1 for group in re.findall(r"\([^)]*", key))


def config_json(config: LoRAConfig) -> str:
    """An adapter_config.json that PEFT reads as this config, for inference."""
    content = {name: getattr(config, name) for name in OUR_FIELDS}
    content |= {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "revision": None}
    content |= {"inference_mode": True, "init_lora_weights": True, "modules_to_save": None, "use_dora": False}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
