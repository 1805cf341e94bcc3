"""A packed model that gets other windows computes what one that was packed with them computes."""

from functools import partial

import pytest
import torch

from stellarbyte import ByteModelConfig, ByteTransformer
from stellarbyte.backends.torch_model import ServedModel
from stellarbyte.lora.bank import LoraBank
from tests.support.engines.engine import BACKENDS, Backend, ModelEngine
from tests.support.models.byte_transformer import make_config, make_model, random_tokens

LENGTH = 40
NARROW = {"full_attention_window": 9, "sink_tokens": 3}


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_and_sinks_are_those_of_the_new_config(backend: Backend) -> None:
    model, tokens = make_model(use_xpos=False), random_tokens(LENGTH)
    wide, narrow = make_config(use_xpos=False, full_attention_window=LENGTH), make_config(use_xpos=False, **NARROW)

    def rewindowed(model: ByteTransformer, config: ByteModelConfig, bank: LoraBank) -> ServedModel:
        return backend(model, wide, bank).with_windows_of(config)

    def logprobs(backend: Backend, config: ByteModelConfig) -> torch.Tensor:
        return ModelEngine(model, config, backend).teacher_forced(tokens, 20)

    expected = logprobs(backend, narrow)
    assert not torch.allclose(logprobs(backend, wide), expected, atol=1e-3)
    torch.testing.assert_close(logprobs(rewindowed, narrow), expected)


def test_the_gpu_models_weights_are_kept_with_other_windows() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from stellarbyte.backends.gpu.model import TritonModel

    pack = partial(TritonModel, make_model(use_xpos=False))
    wide, narrow = make_config(use_xpos=False), make_config(use_xpos=False, **NARROW)
    before = pack(wide)
    after, expected = before.with_windows_of(narrow), pack(narrow)
    assert after.config.sink_tokens == 3
    for old, new, right in zip(before.layers, after.layers, expected.layers, strict=True):
        assert (old.window, new.window) == (None, right.window) and new.qkv is old.qkv
