"""PEFT's adapter_config.json, to and from `LoRAConfig`.

Files are untrusted: a regular expression is run only if its cost is bounded, and a field that would change the outputs
in an unsupported way is refused by name.
"""

import dataclasses
import json
import math
import re
from collections.abc import Set
from typing import Any

from stellarbyte.lora.config import LoRAConfig

MAX_REGEX_CHARACTERS = 500
MAX_KEY_CHARACTERS = 200

ACTIVATION = "stellarbyte_activation"  # the field of non-linear adapters, which have a peft_type of their own:
NON_LINEAR = "STELLARBYTE_LORA"  # PEFT, which would ignore the field, refuses the type
_FILE_NAMES = {"activation": ACTIVATION}
OUR_FIELDS = {_FILE_NAMES.get(f.name, f.name): f.name for f in dataclasses.fields(LoRAConfig) if f.init}
# Fields of adapters that are more than plain LoRA, accepted where the caller says so.
USE_DORA, MODULES_TO_SAVE = "use_dora", "modules_to_save"
BEYOND_PLAIN = frozenset({USE_DORA, MODULES_TO_SAVE, ACTIVATION})
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


def parse_config(raw: bytes, *, max_rank: int, max_keys: int, accepts: Set[str] = frozenset()) -> LoRAConfig:
    """Parse an adapter_config.json; absent fields have PEFT's defaults.

    Args:
        max_rank: largest accepted r, also in rank_pattern.
        max_keys: most entries of rank_pattern or alpha_pattern.
        accepts: the fields of BEYOND_PLAIN that may be set.

    Raises:
        AdapterError: this is not the config of such an adapter; the message does not name the file.
    """
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"it is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError("it must contain a JSON object")
    known = _known_fields(content, accepts)
    start = content.get("init_lora_weights")
    if start not in NEUTRAL_STARTS:
        raise AdapterError(
            f"init_lora_weights is {start!r:.100}, which also changes the base model's weights; "
            "save the adapter as plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    if content.get(MODULES_TO_SAVE) is None:
        known.discard(MODULES_TO_SAVE)
    settings = {"r": 8, "lora_alpha": 8, "target_modules": None} | {
        ours: content[name] for name, ours in OUR_FIELDS.items() if name in content and name in known
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


def _known_fields(content: dict[str, Any], accepts: Set[str]) -> set[str]:
    """The fields that are understood; AdapterError for a peft_type or a field that is not."""
    activation = content.get(ACTIVATION)
    if activation and ACTIVATION not in accepts:
        raise AdapterError(f"{ACTIVATION} is {activation!r:.100}, but only linear adapters can be merged or served")
    peft_type = NON_LINEAR if activation else "LORA"
    if content.get("peft_type") != peft_type:
        raise AdapterError(f"peft_type is {content.get('peft_type')!r:.100}, but only {peft_type!r} is supported")
    known = (set(OUR_FIELDS) | NEUTRAL_FIELDS) - (BEYOND_PLAIN - accepts)
    for name, value in content.items():
        if name not in known and value:
            raise AdapterError(f"{name!r:.100} is {value!r:.100}, but only plain LoRA without it is supported")
    return known


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


def config_json(config: LoRAConfig, *, is_causal_lm: bool) -> str:
    """An adapter_config.json that PEFT reads as this config, for inference; PEFT refuses non-linear adapters."""
    content = {name: getattr(config, ours) for name, ours in OUR_FIELDS.items()}
    content |= {"peft_type": "LORA", "task_type": "CAUSAL_LM" if is_causal_lm else None}
    content |= {"base_model_name_or_path": None, "revision": None}
    content |= {"inference_mode": True, "init_lora_weights": True, "modules_to_save": config.modules_to_save or None}
    if config.alora_invocation_tokens is None:
        del content["alora_invocation_tokens"]  # releases of PEFT without aLoRA would warn
    if config.activation is None:
        del content[ACTIVATION]
    else:
        content["peft_type"] = NON_LINEAR
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
