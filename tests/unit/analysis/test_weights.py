"""Sparsity, outliers and singular values equal numpy's over the whole tensor in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from stellarbyte.analysis import spectrum, weights
from stellarbyte.analysis.errors import AnalysisError
from stellarbyte.analysis.parameters import Parameter, parameters_of
from stellarbyte.analysis.spectrum import evenly_spaced, first_singular_values, singular_values, spectra
from stellarbyte.analysis.weights import OUTLIER_CHANNEL, SMALL, open_weights, weight_statistics
from stellarbyte.checkpoint.native import open_checkpoint
from tests.support.models.byte_transformer import EXPERT_VARIANTS, make_model


def of_shape(*shape: int, is_matrix: bool = True) -> Parameter:
    return Parameter(name="w", layer=0, part="w", group="mlp", shape=shape, is_matrix=is_matrix)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix is read in many pieces."""
    monkeypatch.setattr(weights, "CHUNK_NUMBERS", 200)
    monkeypatch.setattr(spectrum, "_CHUNK_NUMBERS", 200)


@pytest.mark.usefixtures("small_chunks")
def test_figures_of_every_tensor_of_a_checkpoint_are_numpys(tmp_path: Path) -> None:
    model = make_model(**EXPERT_VARIANTS["experts with biases, clamped"])
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[::3, 5] = 0
        model.model.layers[1].self_attn.q_proj.weight[:, 7] *= 40
        model.model.layers[1].mlp.experts.gate_up_proj[4, :, 9] *= 60
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert len(parameters_of(checkpoint.config)) == len(list(model.parameters()))
    with open_weights(checkpoint) as read:
        for parameter in parameters_of(checkpoint.config):
            found = weight_statistics(parameter, read(parameter.name))
            w = model.get_parameter(parameter.name).detach().double().numpy()
            rms = np.sqrt(np.mean(w**2))
            assert found.num_elements == w.size
            assert found.rms == pytest.approx(rms, rel=1e-12)
            assert found.norm == pytest.approx(np.linalg.norm(w), rel=1e-12)
            assert found.zeros == np.mean(w == 0)
            assert found.small == np.mean(np.abs(w) <= SMALL * rms)
            assert found.peak == pytest.approx(np.abs(w).max() / rms, rel=1e-12)
            assert found.kurtosis == pytest.approx(np.mean((w - w.mean()) ** 4) / np.var(w) ** 2, rel=1e-9)
            if not parameter.is_matrix:
                assert found.num_channels is found.num_outlier_channels is found.largest_channel is None
                continue
            channels = np.sqrt(np.mean(w**2, axis=-2))
            ratios = channels / np.median(channels)
            expert, channel = (None, int(ratios.argmax())) if w.ndim == 2 else divmod(int(ratios.argmax()), w.shape[2])
            assert found.num_channels == ratios.size
            assert found.num_outlier_channels == np.sum(ratios > OUTLIER_CHANNEL)
            assert found.largest_channel == (expert, channel, pytest.approx(ratios.max(), rel=1e-9))
            if parameter.name == "model.layers.1.mlp.experts.gate_up_proj":
                assert found.num_outlier_channels == 1 and found.largest_channel[:2] == (4, 9)


def test_all_zeros_and_constants_have_no_kurtosis() -> None:
    zeros = weight_statistics(of_shape(4, 6), torch.zeros(4, 6))
    assert (zeros.zeros, zeros.small, zeros.peak, zeros.kurtosis) == (1, 1, 0, None)
    assert (zeros.num_outlier_channels, zeros.largest_channel) == (0, None)
    constant = weight_statistics(of_shape(7, is_matrix=False), torch.full((7,), 0.1, dtype=torch.bfloat16))
    assert constant.kurtosis is None and constant.peak == pytest.approx(1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_the_tensors_name(bad: float) -> None:
    tensor = torch.ones(4, 6)
    tensor[2, 3] = bad
    with pytest.raises(AnalysisError, match=r"^w holds NaN, infinity or numbers whose squares overflow float64\.$"):
        weight_statistics(of_shape(4, 6), tensor)


def decaying(rows: int, columns: int, decay: float) -> torch.Tensor:
    """A matrix with the singular values decay^0, decay^1, ..."""
    numbers = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=numbers, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, columns, generator=numbers, dtype=torch.float64)).Q
    values = decay ** torch.arange(min(rows, columns), dtype=torch.float64)
    return left[:, : len(values)] @ (values[:, None] * right[: len(values)])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (1, 30), (33, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_spectra_are_those_of_numpys_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (found,) = spectra(of_shape(*shape), matrix)
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    shares = values / values.sum()
    assert (found.method, found.num_values) == ("exact", min(shape))
    assert found.largest == pytest.approx(values[0], rel=1e-9)
    assert found.stable_rank == pytest.approx(np.sum(values**2) / values[0] ** 2, rel=1e-9)
    assert found.effective_rank == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-6)
    assert [index for index, _ in found.curve] == list(range(min(shape)))
    assert [value for _, value in found.curve] == pytest.approx(values, rel=1e-6)


@pytest.mark.usefixtures("small_chunks")
def test_randomized_spectra_have_the_first_values_and_the_exact_norm() -> None:
    matrix = decaying(120, 150, 0.95)
    (found,) = spectra(of_shape(120, 150), matrix, exact_side=100)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert (found.method, found.num_values, found.effective_rank) == ("randomized", 120, None)
    assert found.largest == pytest.approx(values[0], rel=1e-10)
    assert found.stable_rank == pytest.approx(np.sum(values**2) / values[0] ** 2, rel=1e-10)
    assert [value for _, value in found.curve] == pytest.approx(values[:64], rel=1e-4)


def test_randomized_values_of_noise_are_near_and_never_above() -> None:
    matrix = torch.randn(300, 200, generator=torch.Generator().manual_seed(3))  # its values hardly decay
    found = first_singular_values(matrix, 20).numpy()
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:20]
    assert np.all(found <= values * (1 + 1e-12)) and np.all(found >= 0.98 * values)


def test_a_matrix_of_rank_one_and_a_zero_matrix() -> None:
    (one,) = spectra(of_shape(6, 4), torch.ones(6, 4))
    assert (one.stable_rank, one.effective_rank) == (pytest.approx(1), pytest.approx(1, abs=1e-6))
    assert one.largest == pytest.approx(24**0.5)
    (zero,) = spectra(of_shape(6, 4), torch.zeros(6, 4))
    assert (zero.largest, zero.stable_rank, zero.effective_rank) == (0, 0, 0)


def test_experts_of_a_stack_are_evenly_spaced_and_vectors_have_no_spectrum() -> None:
    stack = torch.randn(10, 5, 7, generator=torch.Generator().manual_seed(2))
    found = list(spectra(of_shape(10, 5, 7), stack))
    assert [one.expert for one in found] == [0, 3, 6, 9]
    for one in found:
        assert one.largest == pytest.approx(np.linalg.norm(stack[one.expert].double().numpy(), 2), rel=1e-9)
    assert list(spectra(of_shape(5, is_matrix=False), torch.ones(5))) == []
    assert evenly_spaced(3, 4) == [0, 1, 2] and evenly_spaced(31, 4) == [0, 10, 20, 30] and evenly_spaced(9, 1) == [0]


class LargestFloat64(TorchFunctionMode):
    """Remembers the most numbers of a float64 tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_function__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.usefixtures("small_chunks")
def test_no_whole_tensor_is_made_in_float64() -> None:
    """A chunk of rows, and the Gram matrix of the smaller side: never a float64 copy of the matrix."""
    matrix = torch.randn(30, 4000, generator=torch.Generator().manual_seed(4))
    with LargestFloat64() as seen:
        weight_statistics(of_shape(30, 4000), matrix)
        singular_values(matrix)
    assert 4000 <= seen.numbers < 8000  # a row
