"""Jobs, events and checkpoints as the API shows them, and the store of a request."""

from typing import Any

import msgspec

from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.service import Service
from stellarbyte_server.tuning.jobs import Event, Hyperparameters, Job, Publication
from stellarbyte_server.tuning.results import checkpoint_name
from stellarbyte_server.tuning.store import TuningStore

_COMPARED = ("valid", "base_valid", "previous_valid")
ORGANIZATION = "stellarbyte"  # OpenAI's clients need one


def tuning_of(service: Service) -> TuningStore:
    """The store; ApiError if the server was started without fine-tuning."""
    if service.tuning is None:
        raise bad_request(
            "Fine-tuning is off because the server was started without --fine-tuning.", code="fine_tuning_required"
        )
    return service.tuning


def hyperparameters_object(chosen: Hyperparameters) -> dict[str, Any]:
    return {name: "auto" if value is None else value for name, value in msgspec.structs.asdict(chosen).items()}


def job_object(job: Job) -> dict[str, Any]:
    chosen = hyperparameters_object(job.hyperparameters)
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "error": None if job.error is None else msgspec.structs.asdict(job.error),
        "fine_tuned_model": job.fine_tuned_model,
        "finished_at": job.finished_at,
        "estimated_finish": job.estimated_finish if job.status == "running" else None,
        "hyperparameters": chosen,
        "method": {"type": "supervised", "supervised": {"hyperparameters": chosen}},
        "model": job.model,
        "organization_id": ORGANIZATION,
        "result_files": list(job.result_files),
        "status": job.status,
        "trained_tokens": job.tokens if job.status == "succeeded" else None,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "seed": job.seed,
        "user_provided_suffix": job.suffix,
        "integrations": [],
        "metadata": job.metadata,
        "losses": {name: job.losses.get(name) for name in ("train", *_COMPARED)},
        "exact_match": {name: job.exact_match.get(name) for name in _COMPARED} if job.evaluate else None,
        "publish": None if job.publish is None else _publication_object(job.publish),
    }


def _publication_object(asked: Publication) -> dict[str, Any]:
    return {"name": asked.name, "share": asked.share, "version": asked.version, "error": asked.error}


def event_object(event_id: str, event: Event) -> dict[str, Any]:
    return {
        "id": event_id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": "message" if event.data is None else "metrics",
        "data": event.data,
    }


def checkpoint_objects(job: Job, train_losses: dict[int, float]) -> list[dict[str, Any]]:
    """The adapters after the last epochs, newest first; the last one is the result. None before the job has ended."""
    if job.fine_tuned_model is None or job.steps is None:
        return []
    adapters = [
        (checkpoint.id, checkpoint.step, checkpoint.created_at, checkpoint_name(job.fine_tuned_model, checkpoint.step))
        for checkpoint in job.checkpoints
    ]
    adapters.append((job.result_checkpoint, job.steps, job.finished_at or 0, job.fine_tuned_model))
    shown = []
    for checkpoint_id, step, created_at, name in sorted(adapters, key=lambda adapter: -adapter[1]):
        valid = job.losses.get(f"valid@{step}")
        shown.append(
            {
                "id": checkpoint_id,
                "object": "fine_tuning.job.checkpoint",
                "created_at": created_at,
                "fine_tuned_model_checkpoint": name,
                "fine_tuning_job_id": job.id,
                "metrics": {
                    "step": step,
                    "train_loss": train_losses.get(step),
                    "valid_loss": valid,
                    "full_valid_loss": valid,
                },
                "step_number": step,
            }
        )
    return shown
