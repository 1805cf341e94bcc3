"""The settings of `stellarbyte train tokenizer`."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from stellarbyte.train.config.sources import Source
from stellarbyte.train.config.yaml_file import Section

NUM_BYTES = 256  # the first tokens of every vocabulary after the special ones
MAX_SAMPLE_BYTES = (1 << 31) - 1  # BpeTrainer counts pairs in 32 bits, and overflows silently (tokenizers#1681)


class Splits(Section):
    """Where texts are cut before tokens are learned: no token is longer than a piece."""

    digits: int = Field(default=1, ge=1, le=8, description="digits of a number in a piece")
    han: int = Field(default=4, ge=1, le=16, description="Chinese characters in a piece")


class SpecialTokens(Section):
    """Tokens that no text contains. They have the first ids, in this order; bos stands before every document."""

    pad: str = Field(default="<|pad|>", min_length=1)
    bos: str | None = Field(default="<|bos|>", min_length=1)
    eos: str = Field(default="<|eos|>", min_length=1)
    chat: list[str] = Field(default=["<|im_start|>"], description="in the chat template; eos ends each message")
    chat_template: Path | None = Field(default=None, description="a Jinja file; absent: ChatML with eos")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pad == self.eos:
            raise ValueError("pad must differ from eos: masking the padding would mask the ends of the answers")
        if len(set(self.all)) < len(self.all) or "" in self.all:
            raise ValueError("every special token must be another text")
        return self

    @property
    def all(self) -> list[str]:
        return [token for token in (self.pad, self.bos, self.eos, *self.chat) if token is not None]


class Stage(Section):
    """Adds merges to those of the stages before until the vocabulary has `vocabulary` tokens in all."""

    vocabulary: int = Field(ge=1, le=1_000_000)
    kinds: list[str] | None = Field(default=None, min_length=1, description="of the sources to learn from; absent: all")
    min_frequency: int = Field(default=2, ge=1, description="how often a pair must occur to become a token")


class TrainTokenizer(Section):
    """A byte-level BPE tokenizer, written to the folder `output`. Paths are relative to the current folder."""

    output: Path
    sources: list[Source] = Field(min_length=1)
    stages: list[Stage] = Field(min_length=1)
    splits: Splits = Splits()
    special_tokens: SpecialTokens = SpecialTokens()
    sample_bytes: int = Field(default=1 << 25, ge=1 << 20, le=MAX_SAMPLE_BYTES, description="of text for each stage")

    @model_validator(mode="after")
    def _check(self) -> Self:
        least = NUM_BYTES + len(self.special_tokens.all)
        known = {source.kind for source in self.sources}
        before = 0
        for number, stage in enumerate(self.stages, start=1):
            if stage.vocabulary < least:
                raise ValueError(f"vocabulary {stage.vocabulary} of stage {number} must be at least {least}:"
                                 f" {NUM_BYTES} bytes and {least - NUM_BYTES} special tokens")  # fmt: skip
            if stage.vocabulary <= before:
                raise ValueError(f"vocabulary {stage.vocabulary} of stage {number} must be above that of the stage"
                                 f" before, {before}")  # fmt: skip
            if unknown := set(stage.kinds or ()) - known:
                raise ValueError(f"kind {min(unknown)!r} of stage {number} is that of no source; there are"
                                 f" {', '.join(sorted(known))}")  # fmt: skip
            before = stage.vocabulary
        return self
