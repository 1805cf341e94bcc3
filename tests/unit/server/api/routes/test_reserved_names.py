"""POST /v1/load_lora_adapter for names like those of fine-tuned models."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from stellarbyte_server.api.contract.bodies.adapters import LoadBody
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.routes import adapters
from stellarbyte_server.config.settings import EngineSettings, ServerSettings


def test_they_are_refused_while_there_may_be_fine_tuned_models(monkeypatch: pytest.MonkeyPatch) -> None:
    async def parsed(*_: object) -> LoadBody:
        return LoadBody(lora_name="ft:tiny:x:01234567", lora_path="a", base_model_name="another")

    monkeypatch.setattr(adapters, "parse_apart", parsed)
    settings = ServerSettings(engine=EngineSettings(model="m"))
    for tuning, param in ((object(), "lora_name"), (None, "base_model_name")):
        service: Any = SimpleNamespace(settings=settings, tuning=tuning)
        with pytest.raises(ApiError) as refused:
            asyncio.run(adapters.load_adapter(SimpleNamespace(), service))  # type: ignore[arg-type]
        assert refused.value.param == param
