"""The service, with the state that all routes need; created once, when the engine is ready."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request

from stellarbyte_server.api.sampling import read_defaults
from stellarbyte_server.batch.storage import Storage
from stellarbyte_server.client.replicas.replicas import Replicas
from stellarbyte_server.config.settings import ServerSettings
from stellarbyte_server.feedback.store import FeedbackStore
from stellarbyte_server.protocol.messages import EngineInfo
from stellarbyte_server.protocol.request import Channels, Reasoning
from stellarbyte_server.registry.store import AdapterRegistry
from stellarbyte_server.tokens.text_work import TextWork
from stellarbyte_server.tokens.tokenizer import PromptTokenizer, load_prompt_tokenizer
from stellarbyte_server.tuning.store import TuningStore


@dataclass(frozen=True, kw_only=True)
class Service:
    """The served model and the client of its engine."""

    settings: ServerSettings
    client: Replicas
    info: EngineInfo
    tokenizer: PromptTokenizer
    sampling_defaults: Mapping[str, Any]  # of the model, for fields absent from requests
    started_at: int  # Unix seconds, the same in all HTTP processes
    registry: AdapterRegistry
    storage: Storage | None = None  # of --data-dir
    tuning: TuningStore | None = None  # None: --fine-tuning is off
    feedback: FeedbackStore | None = None  # None: --feedback is off
    text_work: TextWork = field(default_factory=TextWork)

    @property
    def reasoning(self) -> Reasoning | Channels | None:
        """How the model sets its reasoning apart; None: it does not, or reasoning is not parsed."""
        return None if self.settings.reasoning_parser == "none" else self.tokenizer.reasoning

    @property
    def channels(self) -> Channels | None:
        """The channels of the model's messages; None: its answers are one text, or reasoning is not parsed."""
        reasoning = self.reasoning
        return reasoning if isinstance(reasoning, Channels) else None

    def fingerprint(self, adapter_hash: str) -> str:
        """Identifies the weights, adapter and number formats, on which the answer to a seeded request depends.

        `adapter_hash` is "" without an adapter.
        """
        parts = ["fp", self.info.weights_hash[:12], adapter_hash[:12], self.info.dtype]
        if self.info.quantization != "none":
            parts.append(self.info.quantization)
        if self.info.kv_cache_dtype != self.info.dtype:
            parts.append(f"kv-{self.info.kv_cache_dtype}")
        return "_".join(part for part in parts if part)


def load_service(
    settings: ServerSettings,
    client: Replicas,
    started_at: int,
    registry: AdapterRegistry,
    storage: Storage | None = None,
    tuning: TuningStore | None = None,
    feedback: FeedbackStore | None = None,
) -> Service:
    """Read the model's folder for HTTP once the engine has started; ValueError or OSError on failure."""
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
        sampling_defaults=read_defaults(model_path),
        started_at=started_at,
        registry=registry,
        storage=storage,
        tuning=tuning,
        feedback=feedback,
    )


async def _service(request: Request) -> Any:  # async, as FastAPI runs other functions in a thread
    return request.app.state.service


ServiceOfRequest = Annotated[Service, Depends(_service)]
