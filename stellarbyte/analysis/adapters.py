"""What an adapter changes: the size and rank of ΔW in each module, and the logits, layer by layer."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from stellarbyte.analysis.errors import AnalysisError
from stellarbyte.analysis.spectrum import EXACT_SIDE, effective_rank, singular_values
from stellarbyte.checkpoint.errors import one_line
from stellarbyte.lora import LoRALayer, load_adapter, remove_lora
from stellarbyte.lora.adapted_model import adapter_layers
from stellarbyte.lora.layers import AdapterLayer, weight_of
from stellarbyte.model.transformer import ByteTransformer

EFFECT_TOKENS = 64  # first ones of the text
RANK_SHARE = 0.01  # of the largest singular value: those above count as used
_ACTIVE = "analysed"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_ROWS = 256

# O rows (outputs), I columns (inputs), r rank, T tokens, V vocabulary


@dataclass(frozen=True, kw_only=True)
class ModuleChange:
    """ΔW of one parameter: scale · B A of LoRA, f ⊙ (W + scale · B A) - W of DoRA, copy - W of modules_to_save.

    Attributes:
        layer: None: outside the layers.
        part: the parameter's module within the layer, or its whole name.
        rank: r of the matrices; None: a copy.
        norm / relative: ‖ΔW‖_F, and divided by ‖W‖_F; relative None: W is 0.
        rank_used: singular values of ΔW above RANK_SHARE of the largest; None: not computed, for vectors, and for
            DoRA and copies with a smaller side above EXACT_SIDE.
        effective_rank: as in `Spectrum`; None with rank_used.
    """

    name: str
    layer: int | None
    part: str
    kind: Literal["lora", "dora", "copy"]
    rank: int | None
    norm: float
    relative: float | None
    rank_used: int | None
    effective_rank: float | None


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The change of the logits if only a part of the adapter is active.

    Attributes:
        layer: of the active modules; None: those outside the layers.
        is_whole: all modules are active; layer is None.
        kl: mean over tokens of KL(p without ‖ p with), in nats.
        rms: root mean square of the change of the logits.
    """

    layer: int | None
    is_whole: bool
    kl: float
    rms: float


@dataclass(frozen=True, kw_only=True)
class AdapterFigures:
    """Attributes: name: of the folder. effects: by layer, outside the layers, and of the whole; () without a text."""

    name: str
    num_parameters: int
    modules: tuple[ModuleChange, ...]
    effects: tuple[Effect, ...]


def analyse_adapter(model: ByteTransformer, folder: Path, ids: tuple[int, ...]) -> AdapterFigures:
    """Read an adapter in PEFT's files, measure it in `model`, and remove it. Effects are on `ids`; (): none.
    An activated adapter has them behind its invocation.

    Raises:
        AnalysisError: the adapter cannot be read, does not fit the model, or is not linear.
    """
    try:
        load_adapter(model, folder, _ACTIVE)
    except ValueError as error:
        raise AnalysisError(f"The adapter {folder} cannot be analysed: {one_line(error)}.") from error
    try:
        layers = adapter_layers(model)
        for name, layer in layers.items():
            if (activation := layer.configs[_ACTIVE].activation) is not None:
                raise AnalysisError(f"The adapter {folder} cannot be analysed: {name} has the activation {activation}.")
        config = next(iter(layers.values())).configs[_ACTIVE]
        shown = (*(config.alora_invocation_tokens or ()), *ids)
        return AdapterFigures(
            name=folder.resolve().name,
            num_parameters=sum(p.numel() for layer in layers.values() for p in layer.parameters_of(_ACTIVE).values()),
            modules=tuple(change for name, layer in layers.items() for change in _changes(name, layer)),
            effects=tuple(_effects(model, layers, shown)) if ids else (),
        )
    finally:
        remove_lora(model, _ACTIVE)


def _place(name: str) -> tuple[int | None, str]:
    """The layer of a module or parameter, and its name there."""
    found = _LAYER.fullmatch(name)
    return (None, name) if found is None else (int(found[1]), found[2])


@torch.no_grad()
def _changes(name: str, adapted: AdapterLayer) -> Iterator[ModuleChange]:
    parameters = adapted.parameters_of(_ACTIVE)
    if not isinstance(adapted, LoRALayer):
        for key, copied in parameters.items():
            own = adapted.base_layer.get_parameter(key)
            yield _change(f"{name}.{key}", "copy", None, own, copied.double().sub_(own), None)
        return
    weight_OI = weight_of(adapted.base_layer)
    a_rI, b_Or = parameters["lora_A"].double(), parameters["lora_B"].double() * adapted.scales[_ACTIVE]
    magnitude_O = parameters.get("lora_magnitude_vector")
    if magnitude_O is not None:
        yield _change(name, "dora", len(a_rI), weight_OI, _dora_change(weight_OI, a_rI, b_Or, magnitude_O), None)
        return
    # B A has the singular values of the product of both triangles.
    core = torch.linalg.qr(b_Or).R @ torch.linalg.qr(a_rI.T).R.T
    yield _change(name, "lora", len(a_rI), weight_OI, core, torch.linalg.svdvals(core))


def _dora_change(
    weight_OI: torch.Tensor, a_rI: torch.Tensor, b_Or: torch.Tensor, magnitude_O: torch.Tensor
) -> torch.Tensor:
    """[O, I] float64, made by rows: beside the result, only some of them are in memory."""
    change_OI = torch.empty(weight_OI.shape, dtype=torch.float64, device=weight_OI.device)
    for start in range(0, len(weight_OI), _ROWS):
        rows = slice(start, start + _ROWS)
        own = weight_OI[rows].double()
        changed = own + b_Or[rows] @ a_rI
        factors = magnitude_O[rows].double() / torch.linalg.vector_norm(changed, dim=1)
        change_OI[rows] = factors[:, None] * changed - own
    return change_OI


def _change(
    name: str,
    kind: Literal["lora", "dora", "copy"],
    rank: int | None,
    weight: torch.Tensor,
    change: torch.Tensor,
    values: torch.Tensor | None,
) -> ModuleChange:
    """`change`: a matrix with the norm of ΔW; `values`: its singular values, if they are known."""
    layer, part = _place(name)
    norm = float(torch.linalg.vector_norm(change))
    own = float(sum(chunk.double().square().sum() for chunk in weight.split(_ROWS))) ** 0.5
    if values is None and change.dim() == 2 and min(change.shape) <= EXACT_SIDE:
        values = singular_values(change.cpu())
    return ModuleChange(
        name=name,
        layer=layer,
        part=part,
        kind=kind,
        rank=rank,
        norm=norm,
        relative=norm / own if own > 0 else None,
        rank_used=None if values is None else int((values > RANK_SHARE * values[0]).sum()),
        effective_rank=None if values is None else effective_rank(values),
    )


@torch.inference_mode()
def _effects(model: ByteTransformer, layers: dict[str, AdapterLayer], ids: tuple[int, ...]) -> Iterator[Effect]:
    input_ids = torch.tensor([ids[:EFFECT_TOKENS]], device=model.device)

    def logits(active: Collection[str]) -> torch.Tensor:
        for name, layer in layers.items():
            layer.activate((_ACTIVE,) if name in active else ())
        return model(input_ids, use_cache=False).logits[0].float()

    places = {name: _place(name)[0] for name in layers}
    without_TV = logits(())
    numbers = sorted({place for place in places.values() if place is not None})
    for number in [*numbers, *([None] if None in places.values() else [])]:
        with_TV = logits([name for name, place in places.items() if place == number])
        yield _effect(without_TV, with_TV, layer=number, is_whole=False)
    yield _effect(without_TV, logits(layers), layer=None, is_whole=True)


def _effect(without_TV: torch.Tensor, with_TV: torch.Tensor, *, layer: int | None, is_whole: bool) -> Effect:
    kl = squares = 0.0
    for before_V, after_V in zip(without_TV, with_TV, strict=True):  # in float64, which all of them would not fit in
        before_V, after_V = before_V.double(), after_V.double()
        log_p, log_q = before_V.log_softmax(dim=-1), after_V.log_softmax(dim=-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        squares += float((after_V - before_V).square().sum())
    return Effect(layer=layer, is_whole=is_whole, kl=kl / len(with_TV), rms=(squares / with_TV.numel()) ** 0.5)
