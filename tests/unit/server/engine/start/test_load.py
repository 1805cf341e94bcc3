"""What a start needs of the machine and of the model, said in one sentence where it is not there."""

import importlib.util
import logging
import shutil
from pathlib import Path

import pytest
import torch

from stellarbyte.backends.cpu_model import CpuModel
from stellarbyte.backends.torch_model import TorchModel
from stellarbyte.checkpoint.convert import convert
from stellarbyte.lora.bank import LoraBank
from stellarbyte_server.engine.start.load import _cpu_model
from stellarbyte_server.engine.start.machine import require_triton
from stellarbyte_server.engine.start.model_folder import open_model_folder
from stellarbyte_server.engine.start.serving_plan import StartupError
from tests.support.models.byte_transformer import EXPERTS, make_model
from tests.support.models.quantized import write_quantized


def test_a_gpu_needs_triton_and_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StartupError, match="needs the package triton"):
        require_triton()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(StartupError, match="needs a C compiler"):
        require_triton()
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    require_triton()


def test_a_cpu_serves_what_its_kernels_do_not_support_in_plain_torch() -> None:
    """A share of the scores decides how many experts a token chooses: kernels have fixed numbers."""
    model = make_model(**EXPERTS, router_top_p=0.5)
    assert isinstance(_cpu_model(model, model.config, LoraBank(model.config), "none"), TorchModel)
    with pytest.raises(StartupError, match="--quantization int8 on a CPU needs float32 and a model that its kernels"):
        _cpu_model(model, model.config, LoraBank(model.config), "int8")
    with pytest.raises(StartupError, match="--deterministic on a CPU needs float32 and a model that its kernels"):
        _cpu_model(model, model.config, LoraBank(model.config), "none", deterministic=True)
    half = make_model(hidden_size=64, intermediate_size=128).bfloat16()
    bank = LoraBank(half.config, dtype=torch.bfloat16)
    with pytest.raises(StartupError, match="--quantization int4 on a CPU needs float32"):
        _cpu_model(half, half.config, bank, "int4")
    with pytest.raises(StartupError, match="--deterministic on a CPU needs float32"):
        _cpu_model(half, half.config, bank, "none", deterministic=True)


def test_a_cpu_serves_experts_by_its_kernels() -> None:
    model = make_model(**EXPERTS | {"hidden_size": 64, "moe_intermediate_size": 64})
    for quantization in ("none", "int8", "int4"):
        assert isinstance(_cpu_model(model, model.config, LoraBank(model.config), quantization), CpuModel)


@pytest.mark.parametrize(("name", "form"), [("compressed-tensors W8A8", "int8"), ("awq, groups of 16", "none")])
def test_a_cpu_keeps_a_quantized_checkpoint_if_it_can_and_says_so(
    name: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = convert(write_quantized(tmp_path, name)[0], tmp_path / "target")
    with caplog.at_level(logging.INFO):
        folder = open_model_folder(path, is_dummy=False)
        model, kept = folder.kept_model(torch.float32, torch.device("cpu"))
        served = _cpu_model(model, folder.config, LoraBank(folder.config), "none", kept)
    assert served.quantization == form  # also in the fingerprint of answers
    assert ("weights are in int8" if form == "int8" else "weights are dequantized") in caplog.text
    assert (
        f"the weights are from {'compressed-tensors int-quantized' if form == 'int8' else 'AWQ, 4 bits'}" in caplog.text
    )
    assert ("activations are not quantized" in caplog.text) == (form == "int8")
