"""Which parameters train, by patterns over their names."""

import re
from collections.abc import Iterable

from torch import nn

from stellarbyte.lora.layers import AdapterLayer

Parameters = dict[str, nn.Parameter]


def freeze(model: nn.Module, patterns: Iterable[str]) -> tuple[str, ...]:
    """Stop the training of parameters; returns the names of those that the patterns match.

    A pattern is a regular expression for the end of a dotted name, after a dot or from the start, as PEFT's
    rank_pattern has them: of a parameter ("bias", "lora_A.default.weight"), or of a module with all its parameters
    ("embed_tokens", r"layers\\.[0-3]"). Names are those without LoRA: a wrapped layer's own weight is
    "q_proj.weight". An adapter's frozen matrices stay frozen when the adapter is activated again.

    Raises:
        ValueError: a pattern is no regular expression, or matches nothing; no parameter has then changed.
    """
    return _set_trainable(model, patterns, False)


def unfreeze(model: nn.Module, patterns: Iterable[str]) -> tuple[str, ...]:
    """Let parameters train, such as norms beside an adapter; patterns and errors are those of `freeze`.

    An adapter that was loaded from files trains once its "lora_A" and "lora_B" are unfrozen. `save_adapter` writes no
    parameters of the base model: save the model itself to keep those that were trained.

    Raises:
        ValueError: as `freeze`.
    """
    return _set_trainable(model, patterns, True)


def _set_trainable(model: nn.Module, patterns: Iterable[str], trains: bool) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise ValueError(f"patterns ({patterns!r:.100}) must be a list of regular expressions, not a text")
    parameters = _parameters(model)
    matched: Parameters = {}
    for pattern in patterns:
        found = _matched(parameters, pattern)
        if not found:
            raise ValueError(f"pattern {pattern!r:.100} matches no parameter and no module of the model")
        matched |= found
    for parameter in matched.values():
        parameter.requires_grad_(trains)
    for layer in model.modules():
        if isinstance(layer, AdapterLayer):
            layer.set_frozen(set(matched.values()), not trains)
    return tuple(matched)


def _parameters(model: nn.Module) -> Parameters:
    """Parameters by their names without LoRA; a tied one has all its names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name.replace(".base_layer.", "."): parameter for name, parameter in named}


def _matched(parameters: Parameters, pattern: str) -> Parameters:
    try:
        ending = re.compile(rf"(.*\.)?({pattern})(\..*)?")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"pattern {pattern!r:.100} is not a valid regular expression") from error
    return {name: parameter for name, parameter in parameters.items() if ending.fullmatch(name)}
