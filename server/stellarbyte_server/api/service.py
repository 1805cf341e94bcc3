"""What every route needs, made once when the engine is ready. Knows no routes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request

from stellarbyte_server.client.engine_client import EngineClient
from stellarbyte_server.config.settings import ServerSettings
from stellarbyte_server.protocol.messages import EngineInfo
from stellarbyte_server.tokens.text_work import TextWork
from stellarbyte_server.tokens.tokenizer import PromptTokenizer, load_prompt_tokenizer, read_json


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What a request that does not say gets; from the model's generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def load(cls, model_path: Path) -> "SamplingDefaults":
        """ValueError when the file is broken or a value makes no sense."""
        file = model_path / "generation_config.json"
        config = read_json(file)
        defaults = cls(**{name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None})
        for name, value in vars(defaults).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ValueError(f"{file}: {name} is {value!r}, which is no number of at least 0")
        if defaults.repetition_penalty == 0:
            raise ValueError(f"{file}: repetition_penalty is 0, by which nothing can be divided")
        return defaults


@dataclass(frozen=True, kw_only=True)
class Service:
    """The served model and the way to its engine."""

    settings: ServerSettings
    client: EngineClient
    info: EngineInfo
    tokenizer: PromptTokenizer
    defaults: SamplingDefaults
    started_at: int  # Unix seconds, the same in all HTTP processes
    text_work: TextWork = field(default_factory=TextWork)

    def fingerprint(self, adapter_hash: str) -> str:
        """Names weights, adapter and the numbers they are computed in: what the answer to a seeded request depends on.

        `adapter_hash` is "" without an adapter.
        """
        parts = ["fp", self.info.weights_hash[:12], adapter_hash[:12], self.info.dtype]
        if self.info.quantization != "none":
            parts.append(self.info.quantization)
        if self.info.kv_cache_dtype != self.info.dtype:
            parts.append(f"kv-{self.info.kv_cache_dtype}")
        return "_".join(part for part in parts if part)


def load_service(settings: ServerSettings, client: EngineClient, started_at: int) -> Service:
    """Read what HTTP needs of the model's folder once the engine has started; ValueError or OSError when it cannot."""
    model_path = Path(client.info.model_path)
    return Service(
        settings=settings,
        client=client,
        info=client.info,
        tokenizer=load_prompt_tokenizer(
            model_path,
            settings.chat_template,
            client.info.vocab_size,
            may_stand_in=settings.engine.load_format == "dummy",
        ),
        defaults=SamplingDefaults.load(model_path),
        started_at=started_at,
    )


async def _service(request: Request) -> Any:  # FastAPI would run a function that is not async in a thread
    return request.app.state.service


ServiceOfRequest = Annotated[Service, Depends(_service)]
