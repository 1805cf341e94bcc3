"""What all fine-tuning jobs of a server have in common, and the settings of a process that trains one."""

from dataclasses import dataclass
from pathlib import Path

from stellarbyte_server.tuning.examples import Template
from stellarbyte_server.tuning.jobs import Evaluation, Hyperparameters
from stellarbyte_server.tuning.store import CHATS, VALIDATION
from stellarbyte_server.tuning.worker import Settings


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of all jobs: what `Settings` has beyond a job."""

    model: str
    base: str  # the model's name in the API
    template: str | None
    rank: int
    context: int
    device: str
    threads: int
    memory: int | None
    shown: Template

    def settings(
        self,
        folder: Path,
        chosen: Hyperparameters,
        *,
        seed: int,
        has_validation: bool,
        max_tokens: int | None,
        only_plan: bool = False,
        previous: Path | None = None,
        evaluate: tuple[Evaluation, ...] = (),
    ) -> Settings:
        """Of a process that works on the checked examples in `folder`."""
        assert chosen.n_epochs is not None and chosen.batch_size is not None, "chosen when the files were checked"
        assert chosen.learning_rate_multiplier is not None
        return Settings(
            folder=str(folder),
            model=self.model,
            chats=str(folder / CHATS),
            validation=str(folder / VALIDATION) if has_validation else None,
            template=self.template,
            seed=seed,
            epochs=chosen.n_epochs,
            batch=chosen.batch_size,
            learning_rate_multiplier=chosen.learning_rate_multiplier,
            rank=self.rank,
            context=self.context,
            device=self.device,
            threads=self.threads,
            memory=self.memory,
            max_tokens=max_tokens,
            only_plan=only_plan,
            previous=None if previous is None else str(previous),
            evaluate=evaluate,
        )


def chosen(asked: Hyperparameters, num_examples: int) -> Hyperparameters:
    """The hyperparameters for a number of examples; small files are read more often, as in OpenAI's cookbook."""
    epochs = 3
    if num_examples * epochs < 100:
        epochs = min(25, -(-100 // num_examples))
    elif num_examples * epochs > 25_000:
        epochs = max(1, 25_000 // num_examples)
    return Hyperparameters(
        n_epochs=epochs if asked.n_epochs is None else asked.n_epochs,
        batch_size=min(8, num_examples) if asked.batch_size is None else min(asked.batch_size, num_examples),
        learning_rate_multiplier=(1.0 if asked.learning_rate_multiplier is None else asked.learning_rate_multiplier),
    )
