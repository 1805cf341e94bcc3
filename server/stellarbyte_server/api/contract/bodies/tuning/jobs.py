"""The bodies of /v1/fine_tuning/jobs and of a check without a job, and the queries of lists."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from stellarbyte_server.api.contract.bodies.batch.batches import FileId
from stellarbyte_server.api.contract.bodies.bounds import AtMost, wrong
from stellarbyte_server.api.contract.bodies.fields import optional, required
from stellarbyte_server.api.contract.bodies.unused import Metadata
from stellarbyte_server.config.setting_values import ADAPTER_NAME_RULE, is_adapter_name
from stellarbyte_server.config.settings import TUNED_PREFIX

MAX_PAGE = 100
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
Auto = Literal["auto"]


def _number(low: float, high: float, *, is_whole: bool) -> BeforeValidator:
    """auto, or a number of these bounds; a union would name its branches in errors."""
    kinds = (int,) if is_whole else (int, float)

    def check(value: object) -> object:
        if value is None or value == "auto":
            return value
        if type(value) not in kinds or not low <= value <= high:  # type: ignore[operator]
            kind = "an integer" if is_whole else "a number"
            raise wrong(f"it must be 'auto' or {kind} from {low:g} to {high:g}")
        return value

    return BeforeValidator(check)


def _schema(kind: str, low: float, high: float) -> WithJsonSchema:
    number = {"type": kind, "minimum": low, "maximum": high}
    return WithJsonSchema({"anyOf": [{"const": "auto", "type": "string"}, number, {"type": "null"}]})


MAX_EPOCHS, MAX_BATCH, LEAST_MULTIPLIER, MAX_MULTIPLIER = 50, 256, 0.001, 100
Epochs = Annotated[Any, _number(1, MAX_EPOCHS, is_whole=True), _schema("integer", 1, MAX_EPOCHS)]
BatchSize = Annotated[Any, _number(1, MAX_BATCH, is_whole=True), _schema("integer", 1, MAX_BATCH)]
Multiplier = Annotated[
    Any,
    _number(LEAST_MULTIPLIER, MAX_MULTIPLIER, is_whole=False),
    _schema("number", LEAST_MULTIPLIER, MAX_MULTIPLIER),
]


class HyperparametersBody(BaseModel):
    model_config = _STRICT

    n_epochs: Epochs = optional(f"How often the file is read, 1 to {MAX_EPOCHS}. Default: auto, by its size.")
    batch_size: BatchSize = optional(f"Examples of a step, 1 to {MAX_BATCH}. Default: auto, up to 8.")
    learning_rate_multiplier: Multiplier = optional("Of the rate that suits the model's width. Default: auto, 1.")


class SupervisedBody(BaseModel):
    model_config = _STRICT

    hyperparameters: HyperparametersBody | None = optional("How the model is trained.")


def _supervised(value: object) -> object:
    if value in ("dpo", "reinforcement"):
        raise wrong(f"{value} is not supported; the only method is supervised")
    return value


class MethodBody(BaseModel):
    model_config = _STRICT

    type: Annotated[Literal["supervised"], BeforeValidator(_supervised)] = required("The only supported value.")
    supervised: SupervisedBody | None = optional("Settings of this method.")


_NO_ITEMS = WithJsonSchema({"anyOf": [{"type": "array", "items": {}, "maxItems": 0}, {"type": "null"}]})


def _no_integrations(value: object) -> object:
    if value is not None and value != []:
        raise wrong("it may have at most 0 items, since integrations with other services are not supported")
    return value


def _adapter_name(name: str) -> str:
    if not is_adapter_name(name) or name.startswith(TUNED_PREFIX):
        raise wrong(f"it must be {ADAPTER_NAME_RULE}, and not with {TUNED_PREFIX!r}")
    return name


AdapterName = Annotated[
    str, Field(max_length=128), AfterValidator(_adapter_name), WithJsonSchema({"type": "string", "maxLength": 128})
]
Share = Annotated[float, Field(gt=0, lt=1)]


class PublicationBody(BaseModel):
    model_config = _STRICT

    name: AdapterName = required("The name of an adapter, which then has another version, or a new name.")
    share: Share | None = optional(
        "The share of the name's callers that get the new version, while the others keep the one before. Default: all."
    )


class PublishBody(PublicationBody):
    """Of POST /v1/fine_tuning/jobs/{id}/publish."""

    checkpoint: FileId | None = optional("The id of one of the job's checkpoints. Default: the job's result.")


class CheckBody(BaseModel):
    """Of POST /v1/fine_tuning/files/check."""

    model_config = _STRICT

    training_file: FileId = required("A file with purpose fine-tune: one example per line.")
    validation_file: FileId | None = optional("As in a job.")
    method: MethodBody | None = optional("As in a job.")
    hyperparameters: HyperparametersBody | None = optional("As in a job.")


class FineTuningBody(BaseModel):
    model_config = _STRICT

    model: Annotated[str, Field(min_length=1, max_length=256)] = required("The served model's name.")
    training_file: FileId = required("A file with purpose fine-tune: one example per line.")
    validation_file: FileId | None = optional("Examples for the loss before, during and after the training.")
    suffix: Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,64}$")] | None = optional(
        "A part of the new model's name: up to 64 letters, digits and . _ -"
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = optional("Of the order of examples. Default: random.")
    method: MethodBody | None = optional("Default: supervised.")
    hyperparameters: HyperparametersBody | None = optional("The same as in `method`, where OpenAI had it before.")
    evaluate: Annotated[list[Literal["exact_match"]], AtMost(1)] | None = optional(
        "`exact_match`: also count the answers of the validation file that greedy decoding gives token for token."
    )
    publish: PublicationBody | None = optional(
        "Make the result live under another name once the job has succeeded; needs the right to load adapters."
    )
    metadata: Metadata = optional("Returned with the job; lists can be filtered by it.")
    integrations: Annotated[list[Any] | None, BeforeValidator(_no_integrations), _NO_ITEMS] = optional(
        "Not supported; must be empty."
    )


class JobsQuery(BaseModel):
    """Without the filter metadata[KEY]=VALUE."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    after: FileId | None = optional("The id of the last job of the previous page.")
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] | None = optional("Jobs per page, 1 to 100. Default: 20.")


class EventsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    after: FileId | None = optional("The id of the last event of the previous page.")
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] | None = optional("Events per page, 1 to 100. Default: 20.")
    stream: bool | None = optional("Send events, the oldest first, as they happen, until the job ends.")


class CheckpointsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    after: FileId | None = optional("The id of the last checkpoint of the previous page.")
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] | None = optional("Checkpoints per page, 1 to 100. Default: 10.")
