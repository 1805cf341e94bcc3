"""The configuration of a LoRA adapter (Hu et al. 2021)."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

ALL_LINEAR = "all-linear"
ACTIVATIONS = ("gelu", "relu", "silu", "tanh")
MAX_INVOCATION_TOKENS = 256

Value = TypeVar("Value", int, float)
Endings = list[tuple[re.Pattern[str], Value]]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """y = W x + scale · B A dropout(x) on every targeted linear module; scale = lora_alpha / r.

    Fields have PEFT's meanings:
        target_modules: a list of names, each of which matches a module of that name or one whose dotted name ends in
            ".name"; or one regular expression for the whole dotted name; or "all-linear".
        use_rslora: scale = lora_alpha / sqrt(r) (Kalajdzievski 2023).
        fan_in_fan_out: the adapted layers store their weights [in, out], as transformers' Conv1D does.
        bias: only "none": biases are not trained.
        use_dora: the weight is m ⊙ (W + scale · B A) / ‖W + scale · B A‖ by rows, with a trained m (Liu et al. 2024).
        modules_to_save: endings of the names of modules that each adapter has a whole copy of, such as "lm_head"; the
            copies train.
        rank_pattern, alpha_pattern: r and lora_alpha of some modules. A key is a regular expression for the end of the
            dotted name, after a dot or from the start; the first key that matches applies.
        alora_invocation_tokens: the adapter is activated (aLoRA, Greenewald et al. 2025): a text's tokens before the
            last occurrence of these are computed without it, and all tokens, if they do not occur. None: all with it.
    And one that PEFT does not have:
        activation: "gelu", "relu", "silu" or "tanh" between A and B: y = W x + scale · B act(A x). Such an adapter can
            be neither merged nor served. None: linear.

    Raises:
        ValueError: a value is impossible; the message names the field.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | list[str] | str = ("q_proj", "v_proj")
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_dora: bool = False
    modules_to_save: tuple[str, ...] | list[str] = ()
    activation: str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    alora_invocation_tokens: tuple[int, ...] | list[int] | None = None

    _rank_pattern: Endings[int] = field(init=False, repr=False, compare=False)  # the keys compiled
    _alpha_pattern: Endings[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        _check_number("lora_alpha", self.lora_alpha)
        _check_number("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout ({self.lora_dropout}) must be at least 0 and less than 1")
        for name in ("use_rslora", "fan_in_fan_out", "use_dora"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} ({getattr(self, name)!r:.100}) must be True or False")
        if self.bias != "none":
            raise ValueError(f"bias ({self.bias!r:.100}) must be 'none': biases are not trained")
        object.__setattr__(self, "target_modules", _checked_targets(self.target_modules))
        object.__setattr__(self, "modules_to_save", _checked_copies(self.modules_to_save))
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(f"activation ({self.activation!r:.100}) must be one of {', '.join(ACTIVATIONS)}, or None")
        if self.activation is not None and self.use_dora:
            raise ValueError("activation cannot be combined with use_dora")
        self._check_invocation()
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
                raise ValueError(f"{name} ({pattern!r:.100}) must map module names to numbers")
            for key, value in pattern.items():
                (_check_rank if name == "rank_pattern" else _check_number)(f"{name}[{key!r:.100}]", value)
            object.__setattr__(self, name, dict(pattern))
            endings = [(_compile(name, rf"(.*\.)?({key})$"), value) for key, value in pattern.items()]
            object.__setattr__(self, f"_{name}", endings)

    def _check_invocation(self) -> None:
        if self.alora_invocation_tokens is None:
            return
        object.__setattr__(self, "alora_invocation_tokens", _checked_tokens(self.alora_invocation_tokens))
        for name in ("use_dora", "modules_to_save", "activation"):
            if getattr(self, name):
                raise ValueError(f"alora_invocation_tokens cannot be combined with {name}")

    def targets(self, module_name: str) -> bool:
        """Whether a linear module of this dotted name is adapted. With "all-linear" the caller excludes the output
        head."""
        if isinstance(self.target_modules, str):
            return self.targets_all_linear or re.fullmatch(self.target_modules, module_name) is not None
        return any(module_name == name or module_name.endswith(f".{name}") for name in self.target_modules)

    def copies(self, module_name: str) -> bool:
        """Whether an adapter has a copy of this module; not only after a dot, as in PEFT."""
        return module_name.endswith(tuple(self.modules_to_save))

    @property
    def targets_all_linear(self) -> bool:
        """Whether every linear module but the output head is adapted."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def rank_of(self, module_name: str) -> int:
        return next((rank for ending, rank in self._rank_pattern if ending.match(module_name)), self.r)

    def scale_of(self, module_name: str) -> float:
        """The factor of B A x in this module."""
        rank = self.rank_of(module_name)
        alphas = (alpha for ending, alpha in self._alpha_pattern if ending.match(module_name))
        return next(alphas, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _checked_tokens(tokens: object) -> tuple[int, ...]:
    if isinstance(tokens, list | tuple) and 0 < len(tokens) <= MAX_INVOCATION_TOKENS:
        if all(type(token) is int and 0 <= token < 1 << 31 for token in tokens):
            return tuple(tokens)
    raise ValueError(
        f"alora_invocation_tokens ({tokens!r:.100}) must be a list of 1 to {MAX_INVOCATION_TOKENS} token ids"
    )


def _checked_copies(names: object) -> tuple[str, ...]:
    if isinstance(names, list | tuple) and all(isinstance(name, str) and name for name in names):
        return tuple(names)
    raise ValueError(f"modules_to_save ({names!r:.100}) must be a list of module names such as ['lm_head']")


def _checked_targets(targets: object) -> tuple[str, ...] | str:
    if isinstance(targets, str) and targets:
        _compile("target_modules", targets)
        return targets
    if isinstance(targets, list | tuple) and targets and all(isinstance(name, str) and name for name in targets):
        return tuple(targets)
    raise ValueError(
        f"target_modules ({targets!r:.100}) must be a list of module names such as ['q_proj', 'v_proj'], "
        f"one regular expression, or '{ALL_LINEAR}'"
    )


def _check_rank(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} ({value!r:.100}) must be a whole number")
    if value < 1:
        raise ValueError(f"{name} ({value!r:.100}) must be at least 1")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e300:  # false for NaN
        raise ValueError(f"{name} ({value!r:.100}) must be a finite number")


def _compile(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name} ({pattern!r:.100}) is not a valid regular expression") from error
