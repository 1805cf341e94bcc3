"""Routing and products of experts on the CPU against a loop over tokens and experts in float64."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from stellarbyte.model.mlp import GATES
from stellarbyte.ops.cpu.linear import ACTIVATIONS, PLAIN
from stellarbyte.ops.cpu.moe import Experts, make_expert_buffers, mixture
from stellarbyte.ops.cpu.packing import (
    StackedLinears,
    interleave_gated,
    interleaved_rows,
    pack,
    panels_below_each_other,
    quantized_rows,
    unpack,
)
from stellarbyte.ops.cpu.panels.sizes import PANEL_ROWS
from stellarbyte.ops.cpu.routing import Routers, make_pairs, route
from tests.support.cases import some
from tests.support.chosen_experts import choose_experts, sum_of_experts

# T tokens, E experts, K chosen experts of a token, C hidden size, I inner size of an expert, S of the shared expert

THREADS = 2


@dataclass
class Layer:
    """Three pools of random experts, of which layer 2 uses the last; layer 1 is dense."""

    experts: Experts
    router_EC: torch.Tensor
    bias_E: torch.Tensor | None
    gate_up_ENC: torch.Tensor  # as packed, gates above ups
    down_ECI: torch.Tensor
    shared_NS: torch.Tensor | None = None
    shared_CS: torch.Tensor | None = None
    shared_gate_C: torch.Tensor | None = None

    def __call__(self, x_TC: torch.Tensor, activation: str = "silu", num_threads: int = THREADS) -> torch.Tensor:
        x = x_TC.numpy()
        out = np.full_like(x, np.nan)
        buffers = make_expert_buffers(x, self.experts)
        for array in (buffers.x_NC, buffers.inner_NI, buffers.shared_inner_TS, buffers.pairs.logits_TE):
            array[:] = np.nan
        mixture(x, 2, self.experts, ACTIVATIONS[activation], PLAIN, buffers, out, num_threads)
        return torch.from_numpy(out)

    def choice(self, x_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routers = self.experts.routers
        logits_TE = x_TC.double() @ self.router_EC.double().T + (0 if self.bias_E is None else self.bias_E.double())
        selection = routers.selection_bias_ME
        return choose_experts(
            logits_TE, routers.top_k, score="sigmoid" if routers.is_sigmoid else "softmax",
            renormalizes=routers.renormalises,
            selection_bias_E=torch.from_numpy(selection[1]).double() if selection.size else None,
        )  # fmt: skip

    def expected(self, x_TC: torch.Tensor, activation: str = "silu") -> torch.Tensor:
        x_TC, gate = x_TC.double(), GATES[activation]
        out_TC = sum_of_experts(x_TC, *self.choice(x_TC), self.gate_up_ENC.double(), self.down_ECI.double(), gate)
        if self.shared_NS is not None and self.shared_CS is not None:
            gates, ups = (x_TC @ self.shared_NS.double().T).chunk(2, dim=1)
            shared_TC = (gate(gates) * ups) @ self.shared_CS.double().T
            if self.shared_gate_C is not None:
                shared_TC *= (x_TC @ self.shared_gate_C.double()).sigmoid()[:, None]
            out_TC += shared_TC
        return out_TC


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_pools(matrices_ENK: torch.Tensor, quantization: str, *, is_gated: bool) -> tuple[Any, torch.Tensor]:
    """Pools of other experts, of others again, and of these; and these as they are stored."""
    rows = matrices_ENK.shape[1]
    order = np.concatenate([interleaved_rows(rows // 2, half) for half in (0, 1)]) if is_gated else np.arange(rows)

    def joined(matrix_NK: np.ndarray) -> np.ndarray:
        return interleave_gated(*np.split(matrix_NK, 2)) if is_gated else matrix_NK

    pools = [matrix.numpy() for factor in (-1, 3, 1) for matrix in factor * matrices_ENK]
    stored = [unpack(pack(joined(matrix), quantization))[order] for matrix in matrices_ENK.numpy()]
    rows = (quantized_rows(joined(matrix), quantization) for matrix in pools)
    packed = panels_below_each_other(rows, len(pools))
    return packed, torch.from_numpy(np.stack(stored))


def stacked(matrix_NK: torch.Tensor, quantization: str) -> tuple[StackedLinears, torch.Tensor]:
    """A linear that layer 2 alone has, in the second place of the stack; and the matrix as it is stored."""
    both = [pack(matrix.numpy(), quantization) for matrix in (-matrix_NK, matrix_NK)]
    places, widths = np.array([0, -1, 1]), np.array([len(matrix_NK)])
    arrays = (np.stack(parts) for parts in zip(*both, strict=True))
    return StackedLinears(*arrays, np.zeros((2, 0), np.float32), places, widths, 0), torch.from_numpy(unpack(both[1]))


def make_layer(
    *,
    num_experts: int = 6,
    top_k: int = 2,
    hidden: int = 64,
    inner: int = 64,
    shared: int = 0,
    has_shared_gate: bool = False,
    quantization: str = "none",
    has_bias: bool = False,
    has_selection_bias: bool = False,
    is_sigmoid: bool = False,
    renormalises: bool = True,
) -> Layer:
    router_EC = random(num_experts, hidden, seed=1) * hidden**-0.5 * 2
    bias_E = random(num_experts, seed=2) if has_bias else None
    shared_gate_C = random(hidden, seed=3) * hidden**-0.5 if has_shared_gate else None
    rows = router_EC if shared_gate_C is None else torch.cat((router_EC, shared_gate_C[None]))
    panels = pack(rows.numpy(), "none").weights
    bias_MN = np.zeros((2, 0 if bias_E is None else len(panels) * PANEL_ROWS), np.float32)
    if bias_E is not None:
        bias_MN[1, :num_experts] = bias_E.numpy()
    routers = Routers(
        weights_MPCR=np.stack([-panels, panels]),
        bias_MN=bias_MN,
        selection_bias_ME=random(2, num_experts, seed=4).numpy()
        if has_selection_bias
        else np.zeros((2, 0), np.float32),
        num_experts=num_experts,
        top_k=top_k,
        is_sigmoid=is_sigmoid,
        renormalises=renormalises,
    )
    matrices = (random(num_experts, 2 * inner, hidden, seed=5), random(num_experts, hidden, inner, seed=6))
    gate_up, down = (
        packed_pools(matrix * matrix.shape[2] ** -0.5, quantization, is_gated=is_gated)
        for matrix, is_gated in zip(matrices, (True, False), strict=True)
    )
    shared_gate, shared_up = random(2, shared, hidden, seed=7) * hidden**-0.5
    width = shared or 64
    joined = torch.from_numpy(interleave_gated(shared_gate.numpy(), shared_up.numpy())) if shared else random(16, 64)
    shared_gate_up, stored_NS = stacked(joined, quantization)
    shared_down, stored_CS = stacked(random(hidden, width, seed=8) * width**-0.5, quantization)
    order = np.concatenate([interleaved_rows(shared, half) for half in (0, 1)])
    return Layer(
        Experts(
            places_L=np.array([0, -1, 1]), pools_L=np.array([0, -1, 2]), routers=routers, gate_up=gate_up[0],
            down=down[0], intermediate_size=inner, shared_gate_up=shared_gate_up, shared_down=shared_down,
            shared_intermediate_size=shared, has_shared_gate=has_shared_gate,
        ),
        router_EC, bias_E, gate_up[1], down[1][:, :hidden],
        stored_NS[order] if shared else None, stored_CS[:hidden] if shared else None, shared_gate_C,
    )  # fmt: skip


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 17, 100])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (4, 4), (60, 4), (128, 8)])
def test_a_layer_is_the_sum_of_the_chosen_experts(num_tokens: int, num_experts: int, top_k: int) -> None:
    layer, x_TC = make_layer(num_experts=num_experts, top_k=top_k), random(num_tokens, 64)
    assert_near(layer(x_TC), layer.expected(x_TC))


@pytest.mark.parametrize(("hidden", "inner"), [(37, 21), (100, 75), (17, 300), (16, 8)])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_sizes_that_no_panel_divides(hidden: int, inner: int, num_threads: int) -> None:
    layer = make_layer(hidden=hidden, inner=inner, shared=inner + 3, has_shared_gate=True)
    for num_tokens in (1, 5, 30):
        x_TC = random(num_tokens, hidden)
        assert_near(layer(x_TC, num_threads=num_threads), layer.expected(x_TC))


@pytest.mark.parametrize("quantization", some(["int8", "fp8", "int4"], 2))  # each compiles kernels for a minute
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 12, 13, 60])
def test_quantized_experts_are_those_that_are_stored(num_tokens: int, quantization: str) -> None:
    """Of two experts, each has up to 60 tokens: more than are computed from the packed form."""
    layer = make_layer(num_experts=2, top_k=2, inner=128, shared=192, has_shared_gate=True, quantization=quantization)
    x_TC = random(num_tokens, 64)
    assert_near(layer(x_TC), layer.expected(x_TC), 2e-5 if quantization == "fp8" else 5e-4)  # activations of 16 bits


@pytest.mark.parametrize("router", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("num_tokens", [3, 40])
def test_every_kind_of_router(num_tokens: int, router: tuple[bool, ...]) -> None:
    names = ("has_bias", "has_selection_bias", "is_sigmoid", "renormalises")
    layer = make_layer(**dict(zip(names, router, strict=True)), top_k=3, shared=40, has_shared_gate=router[0])
    x_TC = random(num_tokens, 64)
    assert_near(layer(x_TC), layer.expected(x_TC))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    layer, x_TC = make_layer(shared=24), random(9, 64)
    assert_near(layer(x_TC, activation), layer.expected(x_TC, activation))


def route_logits(logits_TE: torch.Tensor, **options: Any) -> Any:
    """The pairs of tokens with these logits."""
    num_tokens, num_experts = logits_TE.shape
    panels = pack(np.eye(num_experts, dtype=np.float32), "none").weights
    settings = {"top_k": 2, "is_sigmoid": False, "renormalises": False} | options
    none = np.zeros((1, 0), np.float32)
    routers = Routers(panels[None], none, none, num_experts=num_experts, **settings)
    pairs = make_pairs(num_tokens, routers, num_experts)
    route(logits_TE.numpy(), 0, routers, pairs, THREADS)
    return pairs


@pytest.mark.parametrize("num_tokens", [1, 20])
@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_ties_go_to_the_lower_expert(num_tokens: int, is_sigmoid: bool) -> None:
    logits_TE = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]]).repeat(num_tokens, 1)
    pairs = route_logits(logits_TE, top_k=4, is_sigmoid=is_sigmoid)
    assert pairs.chosen_TK.tolist() == [[1, 3, 2, 4]] * num_tokens


def test_pairs_are_listed_by_expert_and_token() -> None:
    pairs = route_logits(random(30, 5), top_k=3)
    listed = [
        (expert, pairs.tokens_N[n], pairs.gates_N[n])
        for expert in range(5)
        for n in range(pairs.starts_E[expert], pairs.starts_E[expert + 1])
    ]
    expected = [
        (expert, t, gate)
        for t, (chosen, gates) in enumerate(zip(pairs.chosen_TK.tolist(), pairs.gates_TK, strict=True))
        for expert, gate in zip(chosen, gates, strict=True)
    ]
    assert listed == sorted(expected, key=lambda pair: pair[:2]) and pairs.starts_E[5] == 90


@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_scores_far_apart_or_near_zero_give_finite_gates(is_sigmoid: bool) -> None:
    logits_TE = torch.tensor([[-300.0, -200.0, -250.0], [300.0, -300.0, 0.0]])
    pairs = route_logits(logits_TE, is_sigmoid=is_sigmoid, renormalises=True)
    assert pairs.chosen_TK[1, 0] == 0 and np.isfinite(pairs.gates_TK).all()
    np.testing.assert_allclose(pairs.gates_TK[1].sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("num_tokens", [2, 20])
def test_a_token_of_nan_chooses_experts_that_exist_and_leaves_the_others_alone(num_tokens: int) -> None:
    layer, x_TC = make_layer(shared=24, has_shared_gate=True), random(num_tokens, 64)
    expected = layer.expected(x_TC)
    x_TC[1] = torch.nan
    found = layer(x_TC)
    assert found[1].isnan().all()
    others = [t for t in range(num_tokens) if t != 1]
    assert_near(found[others], expected[others])
