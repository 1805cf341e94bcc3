"""What a start needs of the machine and of the model, said in one sentence where it is not there."""

import importlib.util
import shutil

import pytest

from stellarbyte.backends.cpu_model import CpuModel
from stellarbyte.backends.torch_model import TorchModel
from stellarbyte.lora.bank import LoraBank
from stellarbyte_server.engine.start.load import _cpu_model, _require_triton
from stellarbyte_server.engine.start.serving_plan import StartupError
from tests.support.models.byte_transformer import EXPERTS, make_model


def test_a_gpu_needs_triton_and_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StartupError, match="needs the package triton"):
        _require_triton()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(StartupError, match="needs a C compiler"):
        _require_triton()
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    _require_triton()


def test_a_cpu_serves_what_its_kernels_do_not_support_in_plain_torch() -> None:
    """A share of the scores decides how many experts a token chooses: kernels have fixed numbers."""
    model = make_model(**EXPERTS, router_top_p=0.5)
    assert isinstance(_cpu_model(model, model.config, LoraBank(model.config), "none"), TorchModel)
    with pytest.raises(StartupError, match="--quantization int8 on a CPU needs float32 and a model that its kernels"):
        _cpu_model(model, model.config, LoraBank(model.config), "int8")


def test_a_cpu_serves_experts_by_its_kernels() -> None:
    model = make_model(**EXPERTS | {"hidden_size": 64, "moe_intermediate_size": 64})
    for quantization in ("none", "int8", "int4"):
        assert isinstance(_cpu_model(model, model.config, LoraBank(model.config), quantization), CpuModel)
