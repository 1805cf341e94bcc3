"""What a rank on a GPU says if it cannot load its part of the model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.start import gpu_rank, ranks
from stellarbyte_server.engine.start.serving_plan import StartupError
from tests.support.models.byte_transformer import make_config

REFUSED = "--tensor-parallel-size 2 cannot serve this model on GPUs: its experts."


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (CheckpointError("model.safetensors cannot be read."), CheckpointError, "model.safetensors cannot be read."),
        (ValueError("its experts"), StartupError, REFUSED),
    ],
)
def test_a_damaged_file_is_no_refusal_of_the_model(
    monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception], text: str
) -> None:
    def fails(*_: object) -> Any:
        raise error

    monkeypatch.setattr(gpu_rank, "load_gpu_model", fails)
    monkeypatch.setattr(ranks, "make_bank", lambda *_: None)
    monkeypatch.setattr(ranks, "require_triton", lambda: None)
    folder: Any = SimpleNamespace(config=make_config())
    group: Any = SimpleNamespace(rank=0, ranks=2)
    with pytest.raises(raised) as said:
        ranks.load_rank(EngineSettings(model="m"), folder, torch.float32, group, torch.device("cuda", 0))
    assert str(said.value) == text
