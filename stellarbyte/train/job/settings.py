"""The settings of a job, and the run that follows from them and from its chats."""

from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.parts import adaptable_modules
from stellarbyte.model.transformer import ByteTransformer
from stellarbyte.train.config.run import ChatData, LoraRun, Model
from stellarbyte.train.config.yaml_file import Section

MAX_STEPS = 100_000
_FORWARD_TOKENS = 2048  # of one forward, if one chat is not longer


class Job(Section):
    """Attributes:
    folder: of the job; run/ in it has the checkpoints, adapter/ the result, step-N/ the adapter after an epoch.
    chats, validation: JSONL files; template: a chat template instead of the model's.
    batch: chats of a step; learning_rate_multiplier: of `learning_rate`; context: tokens after which a chat is cut.
    threads: of the CPU; memory: bytes beyond those of the empty process, None: half of the free memory.
    max_tokens: of all epochs. only_plan: end after the plan, before anything is trained.
    previous: an adapter's folder, which is evaluated as well; evaluate: what is computed besides losses, at the end.
    """

    folder: Path
    model: str
    chats: Path
    validation: Path | None = None
    template: Path | None = None
    seed: int = Field(ge=0, lt=2**32)
    epochs: int = Field(ge=1)
    batch: int = Field(ge=1)
    learning_rate_multiplier: float = Field(gt=0)
    rank: int = Field(ge=1)
    context: int = Field(ge=2)
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(ge=1)
    memory: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    only_plan: bool = False
    previous: Path | None = None
    evaluate: tuple[Literal["exact_match"], ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.validation is None and (self.previous is not None or self.evaluate):
            raise ValueError("previous and evaluate need validation")
        return self

    @property
    def base(self) -> Model:
        return Model(path=self.model)

    @property
    def data(self) -> ChatData:
        """One chat a row, as batches count chats; rows are cut to the longest chat later."""
        validation = () if self.validation is None else (self.validation,)
        return ChatData(
            chats=[self.chats], validation=validation, template=self.template, sequence=self.context, packing=False
        )

    def steps(self, num_chats: int) -> int:
        return self.epochs * num_chats // min(self.batch, num_chats)

    def run(self, num_chats: int, longest: int, config: ByteModelConfig) -> LoraRun:
        """The run for `num_chats` chats of at most `longest` tokens. An epoch ends with an evaluation."""
        batch = min(self.batch, num_chats)
        steps = self.steps(num_chats)
        has_validation = self.validation is not None
        return LoraRun.model_validate(
            {
                "run": {
                    "dir": self.folder / "run",
                    "output": self.folder / "adapter",
                    "seed": self.seed,
                    "plots": False,
                },
                "model": {"path": self.model},
                "data": self.data.model_dump() | {"sequence": longest},
                "lora": {"r": self.rank, "alpha": 2 * self.rank},
                "train": {
                    "batch_tokens": batch * longest,
                    "micro_batch": micro_batch(batch, longest),
                    "epochs": self.epochs,
                    "lr": self.learning_rate_multiplier * learning_rate(config),
                    "schedule": "linear",
                    "warmup": steps // 20,
                    "weight_decay": 0,
                    "beta2": 0.999,
                    "precision": "bf16" if self.device == "cuda" else "fp32",
                    "checkpoint_every": max(1, min(50, steps // 10)),
                    "evaluate_every": max(1, num_chats // batch) if has_validation else None,
                    "evaluate_base": has_validation,
                },
            }
        )


def learning_rate(config: ByteModelConfig) -> float:
    """Of an adapter, by the width of the model (Schulman & Thinking Machines 2025, "LoRA Without Regret")."""
    return float(5e-5 * 10 * (2000 / config.hidden_size) ** 0.781)


def micro_batch(batch: int, longest: int) -> int:
    """Chats of one forward: a divisor of the batch."""
    most = max(1, _FORWARD_TOKENS // longest)
    return max(number for number in range(1, min(batch, most) + 1) if batch % number == 0)


def needed_memory(run: LoraRun, config: ByteModelConfig) -> int:
    """Bytes: float32 weights; of the adapter weights, gradients and AdamW's two averages; kept activations.

    The activations are those of a layer's inputs, norms, projections and gate, per token.
    """
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in ByteTransformer(config).parameters())
    trained = sum(run.lora.r * sum(shape) for shape in adaptable_modules(config).values())
    tokens = run.train.micro_batch * run.data.sequence
    kept = config.num_hidden_layers * (12 * config.hidden_size + 4 * config.intermediate_size)
    return 4 * weights + 16 * trained + 4 * tokens * kept
