"""Models of fine-tuning jobs, for the OpenAPI document and tests (see objects.py)."""

from typing import Annotated, Any, Literal

from pydantic import Field

from stellarbyte_server.api.contract.batch_objects import UnixSeconds
from stellarbyte_server.api.contract.objects import AnswerObject, Count


class JobErrorObject(AnswerObject):
    code: str
    message: str
    param: str | None


class HyperparametersObject(AnswerObject):
    n_epochs: int | Literal["auto"]
    batch_size: int | Literal["auto"]
    learning_rate_multiplier: float | Literal["auto"]


class SupervisedObject(AnswerObject):
    hyperparameters: HyperparametersObject


class MethodObject(AnswerObject):
    type: Literal["supervised"]
    supervised: SupervisedObject


class LossesObject(AnswerObject):
    train: Annotated[float | None, Field(description="Of the last step.")]
    valid: Annotated[float | None, Field(description="Of the validation file, with the adapter.")]
    base_valid: Annotated[float | None, Field(description="Of the validation file, without the adapter.")]
    previous_valid: Annotated[
        float | None, Field(description="The same with the version that was live under `publish.name` before the job.")
    ]


class ExactMatchObject(AnswerObject):
    valid: Annotated[float | None, Field(description="With the adapter.")]
    base_valid: Annotated[float | None, Field(description="Without the adapter.")]
    previous_valid: Annotated[float | None, Field(description="With the version before; as in `losses`.")]


class PublicationObject(AnswerObject):
    name: str
    share: Annotated[float | None, Field(description="Of the name's callers; null: all.")]
    version: Annotated[int | None, Field(description="Its number in the name's history, once it is live.")]
    error: Annotated[str | None, Field(description="Why it is not live.")]


class FineTuningJobObject(AnswerObject):
    id: str
    object: Literal["fine_tuning.job"]
    created_at: UnixSeconds
    error: JobErrorObject | None
    fine_tuned_model: Annotated[str | None, Field(description="Usable once the job has succeeded.")]
    finished_at: int | None
    estimated_finish: int | None
    hyperparameters: Annotated[HyperparametersObject, Field(description="auto until the files have been checked.")]
    method: MethodObject
    model: str
    organization_id: str
    result_files: Annotated[list[str], Field(description="CSV files of the losses of each step.")]
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    trained_tokens: Count | None
    training_file: str
    validation_file: str | None
    seed: int
    user_provided_suffix: str | None
    integrations: list[Any]
    metadata: dict[str, str] | None
    losses: Annotated[LossesObject, Field(description="Nats per token.")]
    exact_match: Annotated[
        ExactMatchObject | None,
        Field(description="Shares of the validation file's answers that greedy decoding gives; null: not asked for."),
    ]
    publish: Annotated[PublicationObject | None, Field(description="null: live under the job's own name only.")]


class FineTuningJobList(AnswerObject):
    object: Literal["list"]
    data: list[FineTuningJobObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FineTuningEvent(AnswerObject):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: UnixSeconds
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: Annotated[dict[str, float] | None, Field(description="The step, and its losses, learning rate or tokens.")]


class FineTuningEventList(AnswerObject):
    object: Literal["list"]
    data: list[FineTuningEvent]
    first_id: str | None
    last_id: str | None
    has_more: bool


class CheckpointMetrics(AnswerObject):
    step: int
    train_loss: float | None
    valid_loss: float | None
    full_valid_loss: float | None


class FineTuningCheckpoint(AnswerObject):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: UnixSeconds
    fine_tuned_model_checkpoint: Annotated[str, Field(description="Usable once the job has succeeded.")]
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int


class FineTuningCheckpointList(AnswerObject):
    object: Literal["list"]
    data: list[FineTuningCheckpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileProblem(AnswerObject):
    param: Annotated[str | None, Field(description="The file; null: the job as a whole, such as its memory.")]
    line: Annotated[int | None, Field(description="From 1; null: not of one line.")]
    message: str


class FineTuningCheck(AnswerObject):
    """With problems, a job would fail; the counts are null as far as they are not known."""

    object: Literal["fine_tuning.check"]
    examples: Annotated[Count, Field(description="Of the training file, without lines with problems.")]
    validation_examples: Count | None
    hyperparameters: Annotated[HyperparametersObject, Field(description="What auto becomes for these files.")]
    steps: Count | None
    tokens: Annotated[Count | None, Field(description="Read in all epochs.")]
    memory: Annotated[Count | None, Field(description="Bytes that the training needs, estimated from the shapes.")]
    seconds: Annotated[
        float | None, Field(description="At the speed of the newest job that has succeeded; null: there is none.")
    ]
    problems: Annotated[list[FileProblem], Field(description="Up to ten; empty: a job can be started.")]


class DeletedModel(AnswerObject):
    id: str
    object: Literal["model"]
    deleted: Literal[True]
