"""An adapter's changes equal those of merged weights in float64, and its effects those of merged models."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stellarbyte import ByteTransformer, LoRAConfig
from stellarbyte.analysis.adapters import RANK_SHARE, AdapterFigures, analyse_adapter
from stellarbyte.analysis.errors import AnalysisError
from stellarbyte.lora import apply_lora_to_model, load_adapter, save_adapter
from stellarbyte.lora.adapted_model import adapter_layers, adapter_names
from tests.support.models import oracle
from tests.support.models.adapters import write_adapter
from tests.support.models.byte_transformer import EXPERT_VARIANTS, VARIANTS, make_model, random_tokens

IDS = tuple(random_tokens(40))


def merged_weights(model: ByteTransformer, folder: Path) -> dict[str, np.ndarray]:
    """Every changed parameter in float64, from the adapter's tensors."""
    copy = ByteTransformer(model.config).eval()
    copy.load_state_dict(model.state_dict())
    load_adapter(copy, folder, "own")
    changed = {}
    for name, layer in adapter_layers(copy).items():
        tensors = {key: tensor.detach().double().numpy() for key, tensor in layer.parameters_of("own").items()}
        if "lora_A" not in tensors:
            changed |= {f"{name}.{key}": value for key, value in tensors.items()}
            continue
        weight = model.get_submodule(name).weight.detach().double().numpy()
        weight = weight + layer.configs["own"].scale_of(name) * tensors["lora_B"] @ tensors["lora_A"]
        if "lora_magnitude_vector" in tensors:
            norms = np.linalg.norm(weight, axis=1, keepdims=True)
            weight = tensors["lora_magnitude_vector"][:, None] * weight / norms
        changed[f"{name}.weight"] = weight
    return changed


def check_modules(model: ByteTransformer, found: AdapterFigures, changed: dict[str, np.ndarray]) -> None:
    by_parameter = {one.name if one.kind == "copy" else f"{one.name}.weight": one for one in found.modules}
    assert by_parameter.keys() == changed.keys()
    for name, weight in changed.items():
        one, own = by_parameter[name], model.get_parameter(name).detach().double().numpy()
        delta = weight - own
        values = np.linalg.svd(delta, compute_uv=False)
        shares = values[values > 1e-12 * values[0]] / values.sum()
        assert one.norm == pytest.approx(np.linalg.norm(delta), rel=1e-6)
        assert one.relative == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(own), rel=1e-6)
        assert one.rank_used == np.sum(values > RANK_SHARE * values[0])
        assert one.effective_rank == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-4)
        assert one.layer == (int(name.split(".")[2]) if ".layers." in name else None)
        if one.layer is not None:
            assert f"model.layers.{one.layer}.{one.part}" == one.name


def check_effects(model: ByteTransformer, found: AdapterFigures, changed: dict[str, np.ndarray]) -> None:
    own = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def logits(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        copy = ByteTransformer(model.config).eval().double()
        copy.load_state_dict(weights)
        with torch.inference_mode():
            return copy(torch.tensor([IDS]), use_cache=False).logits[0]

    before = oracle.logprobs(own, model.config, list(IDS))
    layers = sorted({int(name.split(".")[2]) for name in changed if ".layers." in name})
    places = [*layers, *([None] if any(".layers." not in name for name in changed) else []), "whole"]
    assert [("whole" if one.is_whole else one.layer) for one in found.effects] == places
    for effect, place in zip(found.effects, places, strict=True):
        of_place = {
            name: torch.from_numpy(weight)
            for name, weight in changed.items()
            if place == "whole" or (".layers." in name and name.startswith(f"model.layers.{place}."))
            or (place is None and ".layers." not in name)
        }  # fmt: skip
        assert of_place
        patched = own | of_place
        after = oracle.logprobs(patched, model.config, list(IDS))
        assert effect.kl == pytest.approx(float((before.exp() * (before - after)).sum(dim=-1).mean()), rel=1e-3)
        assert effect.rms == pytest.approx(float((logits(patched) - logits(own)).square().mean().sqrt()), rel=1e-3)


@pytest.mark.parametrize(
    ("variant", "use_dora", "copies"),
    [
        (VARIANTS["xpos window sinks"], False, ()),
        (VARIANTS["llama"], True, ("lm_head",)),
        (EXPERT_VARIANTS["experts, shared with a gate, some layers dense"], False, ("embed_tokens",)),
    ],
)
def test_changes_and_effects_are_those_of_merged_weights(
    variant: dict[str, object], use_dora: bool, copies: tuple[str, ...], tmp_path: Path
) -> None:
    model = make_model(**variant)
    folder = write_adapter(tmp_path / "tones", model, 3, rank=5, size=0.3, use_dora=use_dora, modules_to_save=copies)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = analyse_adapter(model, folder, IDS)
    changed = merged_weights(model, folder)
    check_modules(model, found, changed)
    check_effects(model, found, changed)
    assert found.name == "tones"
    assert {one.rank for one in found.modules if one.kind != "copy"} == {5}
    assert {one.kind for one in found.modules} == {"dora" if use_dora else "lora"} | ({"copy"} if copies else set())
    assert adapter_names(model) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_rank_that_is_not_used_and_layers_without_modules_are_told(tmp_path: Path) -> None:
    model = make_model()
    config = LoRAConfig(r=8, lora_alpha=8, target_modules=["model.layers.1.self_attn.q_proj"])
    copy = apply_lora_to_model(make_model(), config)
    with torch.no_grad():
        layer = copy.get_submodule("model.layers.1.self_attn.q_proj")
        layer.lora_B["default"].weight[:, 2].fill_(0.5)  # one direction of eight
    save_adapter(copy, tmp_path)
    found = analyse_adapter(model, tmp_path, IDS)
    (change,) = found.modules
    assert (change.rank, change.rank_used, change.effective_rank) == (8, 1, pytest.approx(1, abs=1e-5))
    assert [effect.layer for effect in found.effects] == [1, None]
    assert found.effects[0].kl == pytest.approx(found.effects[1].kl) and found.effects[0].kl > 0
    assert found.num_parameters == 8 * (48 + 64)


def test_an_adapter_that_changes_nothing_has_no_rank_and_no_effect(tmp_path: Path) -> None:
    save_adapter(apply_lora_to_model(make_model(), LoRAConfig(r=4, target_modules=["q_proj"])), tmp_path)
    found = analyse_adapter(make_model(), tmp_path, IDS)
    assert {(one.norm, one.relative, one.rank_used, one.effective_rank) for one in found.modules} == {(0, 0, 0, 0)}
    assert {(effect.kl, effect.rms) for effect in found.effects} == {(0, 0)}
    assert analyse_adapter(make_model(), tmp_path, ()).effects == ()


def test_adapters_that_cannot_be_analysed_get_a_sentence_and_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = make_model()
    absent = tmp_path / "absent"
    with pytest.raises(AnalysisError) as caught:
        analyse_adapter(model, absent, IDS)
    assert str(caught.value) == (
        f"The adapter {absent} cannot be analysed: adapter_config.json cannot be read: No such file or directory."
    )
    curved = tmp_path / "curved"
    save_adapter(apply_lora_to_model(make_model(), LoRAConfig(target_modules=["q_proj"], activation="relu")), curved)
    with pytest.raises(AnalysisError, match=r"has the activation relu\.$"):
        analyse_adapter(model, curved, IDS)
    assert adapter_names(model) == []


def test_an_activated_adapter_is_measured_behind_its_invocation(tmp_path: Path) -> None:
    """There it has the effects of the same weights that always act."""
    model, invocation = make_model(), (9, 7)
    write_adapter(tmp_path / "activated", model, 1, invocation=invocation)
    write_adapter(tmp_path / "plain", model, 1)
    ids = tuple(token for token in IDS if token not in invocation)
    activated = analyse_adapter(model, tmp_path / "activated", ids)
    plain = analyse_adapter(model, tmp_path / "plain", (*invocation, *ids))
    assert activated.effects[-1].kl > 0.01
    assert activated.effects == plain.effects and activated.modules == plain.modules
