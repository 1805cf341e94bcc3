"""The YAML files of training runs: `pretrain`, `sft` and `lora`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, create_model, field_validator, model_validator

from stellarbyte.config import ByteModelConfig
from stellarbyte.lora.config import MAX_INVOCATION_TOKENS
from stellarbyte.train.config.presets import PRESETS
from stellarbyte.train.config.yaml_file import Section

Tracker = Literal["tensorboard", "trackio", "swanlab"]

_OF_THE_TOKENIZER = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}
_OF_TRAINING = {
    *("attention_dropout", "residual_dropout", "embedding_dropout", "drop_path_rate"),
    *("router_noise_scale", "capacity_factor", "router_top_p_start", "router_top_p_steps"),
    *("router_balance_coef", "router_z_coef", "router_entropy_coef", "router_load_coef"),
}


def _shape_fields() -> dict[str, Any]:
    """Every field of ByteModelConfig, each of its own type; a field that the file leaves out keeps its default."""
    names = [name for name, kind in ByteModelConfig.__annotations__.items() if "ClassVar" not in str(kind)]
    return {
        name: (ByteModelConfig.__annotations__[name] | None, None)
        for name in names
        if name not in _OF_THE_TOKENIZER and not name.startswith("_")
    }


class Run(Section):
    """Attributes: dir: checkpoints and figures; output: the finished model or adapter, absent: model or adapter in dir;
    track: where losses are shown, too."""

    dir: Path
    output: Path | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    track: tuple[Tracker, ...] = ()
    plots: bool = True

    @model_validator(mode="after")
    def _check(self) -> "Run":
        if self.output is not None and self.dir.resolve().is_relative_to(self.output.resolve()):
            raise ValueError(f"output ({self.output}) must not hold dir ({self.dir}): it appears as a new folder")
        return self


class Model(create_model("_Shape", __base__=Section, **_shape_fields())):  # type: ignore[misc]
    """A checkpoint at `path`, or a new model: a preset, or the fields of ByteModelConfig, which override a preset's."""

    path: str | None = None
    preset: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Model":
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r} is not one of {', '.join(PRESETS)}")
        if self.path is not None:
            if self.preset is not None:
                raise ValueError("give only one of path and preset")
            if fixed := sorted(self.fields.keys() - _OF_TRAINING):
                raise ValueError(f"{fixed[0]} is fixed by the checkpoint at {self.path}")
        elif not (self.preset or self.fields):
            raise ValueError(f"give path, or a preset ({', '.join(PRESETS)}), or the model's shape")
        return self

    @property
    def fields(self) -> dict[str, Any]:
        """The given fields of ByteModelConfig."""
        return {name: getattr(self, name) for name in self.model_fields_set - {"path", "preset"}}


class TokenData(Section):
    """Rows of `sequence` tokens from the folder that `stellarbyte train prepare` has written.

    Attributes:
        packing: rows hold as many documents as fit; false: a row holds one, or a part of one.
        cut: a document may go on in the next row; false: one that does not fit into the rest of a row starts the next.
        position_shift: largest number from which the positions of a row count; each row has a random one of its own.
    """

    shards: Path
    sequence: int = Field(ge=2)
    position_shift: int = Field(default=0, ge=0)
    packing: bool = True
    cut: bool = True
    workers: int = Field(default=0, ge=0, le=64)


class ChatData(Section):
    """Attributes: chats: JSONL files of {"messages": [...]}; held_out: the share of chats that evaluation gets;
    validation: files of chats for evaluation, instead of a share; template: a Jinja chat template instead of the
    model's; position_shift: as of `TokenData`."""

    chats: list[Path] = Field(min_length=1)
    sequence: int = Field(ge=2)
    position_shift: int = Field(default=0, ge=0)
    packing: bool = True
    held_out: float = Field(default=0.0, ge=0, lt=1)
    validation: tuple[Path, ...] = ()
    template: Path | None = None
    license: str = Field(default="unknown", min_length=1)
    workers: int = Field(default=0, ge=0, le=64)

    @model_validator(mode="after")
    def _check(self) -> "ChatData":
        if self.validation and self.held_out:
            raise ValueError("give only one of held_out and validation")
        return self


class Train(Section):
    """How the model is trained.

    Attributes:
        batch_tokens: of one step, over all ranks and accumulated batches; micro_batch: rows of one forward on a rank.
        lr: largest learning rate; warmup: steps up to it; cycles: of cosine_with_restarts.
        balance_rate: by which each step moves the biases of `router_selection_bias` towards an even load of experts.
        ema: decay of the averaged weights, which then are the finished model's; None: none.
        recompute_every: layers 0, n, 2n, ... keep no activations; None: all keep them.
        checkpoint_every, evaluate_every: steps; None: only at the end. keep: checkpoints on disk, beside the best.
        evaluate_base: also evaluate the model as it is before the first step; the card has both losses.
    """

    batch_tokens: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    epochs: float = Field(default=1.0, gt=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0)
    schedule: Literal["cosine", "cosine_with_restarts", "linear", "constant"] = "cosine"
    cycles: int = Field(default=1, ge=1)
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    beta2: float = Field(default=0.95, gt=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    ema: float | None = Field(default=None, gt=0, lt=1)
    balance_rate: float | None = Field(default=None, gt=0, lt=1)
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    compile: bool = False
    recompute_every: int | None = Field(default=None, ge=1)
    checkpoint_every: int | None = Field(default=None, ge=1)
    evaluate_every: int | None = Field(default=None, ge=1)
    evaluate_base: bool = False
    keep: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "Train":
        if self.cycles > 1 and self.schedule != "cosine_with_restarts":
            raise ValueError(f"cycles ({self.cycles}) needs schedule cosine_with_restarts")
        return self


class Stop(Section):
    """Attributes: patience: evaluations without a smaller loss; nan: stop before a step that is not finite."""

    patience: int | None = Field(default=None, ge=1)
    nan: bool = True


class Parallel(Section):
    """Ranks that share one copy of the model. Data parallelism needs nothing here: start with torchrun.

    Attributes:
        fsdp: ranks that divide the parameters; each gathers those of a layer when it computes it.
        tensor: ranks that divide the heads and inner channels of every layer.
    """

    fsdp: int = Field(default=1, ge=1)
    tensor: int = Field(default=1, ge=1)


class Lora(Section):
    """An adapter; the fields are those of stellarbyte.lora.LoRAConfig.

    Attributes: invocation: a text, or token ids, from the last occurrence of which on an activated adapter (aLoRA)
    acts; every chat must contain it before an answer. None: the adapter acts on all tokens.
    """

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | str = "all-linear"
    rslora: bool = False
    dora: bool = False
    invocation: str | list[int] | None = None

    @field_validator("invocation", mode="before")
    @classmethod
    def _check_invocation(cls, given: object) -> object:
        if given is None or (isinstance(given, str) and given):
            return given
        if isinstance(given, list) and 0 < len(given) <= MAX_INVOCATION_TOKENS:
            if all(type(token) is int and token >= 0 for token in given):
                return given
        raise ValueError(f"{given!r:.80} must be a text or a list of 1 to {MAX_INVOCATION_TOKENS} token ids")


class _Config(Section):
    run: Run
    model: Model
    train: Train
    stop: Stop = Stop()
    parallel: Parallel = Parallel()

    @model_validator(mode="after")
    def _check(self) -> "_Config":
        evaluate, save = self.train.evaluate_every, self.train.checkpoint_every
        if self.stop.patience is not None:
            if evaluate is None:
                raise ValueError("stop.patience needs train.evaluate_every")
            if save is None or save % evaluate:
                raise ValueError(
                    f"stop.patience needs train.checkpoint_every ({save}) to be a multiple of train.evaluate_every "
                    f"({evaluate}), so that the best model is on disk"
                )
        self._check_parallel()
        return self

    def _check_parallel(self) -> None:
        for name in ("fsdp", "tensor"):
            number = getattr(self.parallel, name)
            if number > 1 and self.train.optimizer == "muon":
                raise ValueError(
                    f"train.optimizer muon cannot be used with parallel.{name} ({number}): Muon needs whole matrices, "
                    "of which ranks hold parts"
                )
            if number > 1 and self.train.compile:
                raise ValueError(f"train.compile must be false with parallel.{name} ({number})")


class Pretrain(_Config):
    """A model from token shards."""

    data: TokenData


class Sft(_Config):
    """A model trained further on chats; only the answers are learned."""

    data: ChatData

    @model_validator(mode="after")
    def _check_base(self) -> "Sft":
        if self.model.path is None:
            raise ValueError("model.path is missing: the model that learns from the chats")
        return self


class LoraRun(Sft):
    """An adapter of a frozen model from chats."""

    lora: Lora = Lora()

    @model_validator(mode="after")
    def _check_lora(self) -> "LoraRun":
        if self.parallel.tensor > 1:
            raise ValueError(
                f"parallel.tensor ({self.parallel.tensor}) must be 1 for an adapter: its parts are not divided by "
                "heads; use parallel.fsdp"
            )
        if self.train.optimizer == "muon":
            raise ValueError("train.optimizer must be adamw: Muon is for whole matrices, not for their low-rank parts")
        if self.lora.invocation is not None:
            for name, is_given in (
                ("lora.dora", self.lora.dora),
                ("train.compile", self.train.compile),
                ("parallel.fsdp", self.parallel.fsdp > 1),
            ):
                if is_given:
                    raise ValueError(f"{name} cannot be combined with lora.invocation")
        return self
