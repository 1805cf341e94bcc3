"""What a LoRAConfig accepts and which modules it means, compared with PEFT's own matching."""

import copy
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from stellarbyte.lora import LoRAConfig

MODULES = [
    *(f"model.layers.{layer}.self_attn.{letter}_proj" for layer in (0, 1, 10, 11) for letter in "qkvo"),
    *(
        "model.layers.1.mlp.up_proj",
        "model.layers.11.mlp.gate_up_proj",
        "q_proj",
        "xq_proj",
        "lm_head",
        "model.lm_head",
    ),
]
PATTERNS: list[dict[str, int]] = [
    {"q_proj": 2, "v_proj": 3},
    {"layers.1.self_attn.q_proj": 2, "q_proj": 3},
    {"q_proj": 3, "layers.1.self_attn.q_proj": 2},  # the first match counts
    {"^q_proj": 2, "^model.layers.0.self_attn.q_proj": 3},
    {r"layers\.(0|1)\.self_attn\.[qv]_proj": 2, ".*mlp.*": 5},
    {"proj": 2, "_proj": 3, ".*_proj": 4},
    {"q|k": 2},
]


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        ["self_attn.q_proj"],
        ["proj", "up_proj"],
        ["model.layers.1.self_attn.q_proj", "lm_head"],
        r".*\.(0|1)\.self_attn\.[qk]_proj",
        "q_proj",
        r"model\.layers.*",
    ],
)
def test_targets_are_those_of_peft(targets: list[str] | str) -> None:
    theirs = LoraConfig(target_modules=targets)
    ours = LoRAConfig(target_modules=targets)
    for module in MODULES:
        assert ours.targets(module) == bool(check_target_module_exists(theirs, module)), module


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_peft(pattern: dict[str, int]) -> None:
    config = LoRAConfig(r=8, lora_alpha=24, rank_pattern=pattern, alpha_pattern=pattern)
    for module in MODULES:
        expected = pattern.get(get_pattern_key(list(pattern), module))
        assert config.rank_of(module) == (8 if expected is None else expected), module
        assert config.scale_of(module) == (3.0 if expected is None else 1.0), module


def test_rank_stabilized_scale() -> None:
    config = LoRAConfig(r=4, lora_alpha=6, use_rslora=True, rank_pattern={"q_proj": 9})
    assert config.scale_of("v_proj") == 3.0 and config.scale_of("a.q_proj") == 2.0


def test_a_config_is_a_value() -> None:
    config = LoRAConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(LoRAConfig(target_modules=("q_proj",), rank_pattern={"q_proj": 2}))
    assert config != LoRAConfig(target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 0}, r"^r \(0\) must be at least 1$"),
        ({"r": 2.5}, r"^r \(2\.5\) must be a whole number$"),
        ({"r": True}, r"^r \(True\) must be a whole number$"),
        ({"r": "8"}, r"^r \('8'\) must be a whole number$"),
        ({"lora_alpha": math.nan}, r"^lora_alpha \(nan\) must be a finite number$"),
        ({"lora_alpha": 10**400}, "^lora_alpha .* must be a finite number$"),
        ({"lora_alpha": "16"}, r"^lora_alpha \('16'\) must be a finite number$"),
        ({"lora_alpha": None}, "^lora_alpha .* must be a finite number$"),
        ({"lora_dropout": 1.0}, "^lora_dropout .* less than 1$"),
        ({"lora_dropout": -0.1}, "^lora_dropout .* at least 0"),
        ({"target_modules": []}, "^target_modules .* must be a list"),
        ({"target_modules": ""}, "^target_modules .* must be a list"),
        ({"target_modules": [1]}, "^target_modules .* must be a list"),
        ({"target_modules": "(q_proj"}, r"^target_modules \('\(q_proj'\) is not a valid regular expression$"),
        ({"use_rslora": 1}, r"^use_rslora \(1\) must be True or False$"),
        ({"fan_in_fan_out": "no"}, "^fan_in_fan_out .* must be True or False$"),
        ({"bias": "all"}, r"^bias \('all'\) must be 'none'"),
        ({"rank_pattern": ["q_proj"]}, "^rank_pattern .* must map module names to numbers$"),
        ({"rank_pattern": {"q_proj": 0}}, r"^rank_pattern\['q_proj'\] \(0\) must be at least 1$"),
        ({"rank_pattern": {"*": 4}}, "^rank_pattern .* is not a valid regular expression$"),
        ({"alpha_pattern": {"q_proj": math.inf}}, r"^alpha_pattern\['q_proj'\] \(inf\) must be a finite number$"),
    ],
)
def test_impossible_values_are_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LoRAConfig(**fields)


def test_importing_adapters_loads_no_model_classes() -> None:
    """A server imports them at its start: transformers' model classes and peft would take seconds."""
    code = (
        "import sys, stellarbyte.lora; print([m for m in ('transformers.modeling_utils', 'peft') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
