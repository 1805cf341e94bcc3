"""The settings of `stellarbyte train prepare`."""

from pathlib import Path

from pydantic import Field

from stellarbyte.train.config.sources import Source
from stellarbyte.train.config.yaml_file import Section


class Prepare(Section):
    """Texts that become token shards in the folder `output`. Paths are relative to the current folder."""

    output: Path
    tokenizer: Path = Field(description="a folder with tokenizer.json and tokenizer_config.json")
    sources: list[Source] = Field(min_length=1)
    held_out: float = Field(default=0.0, ge=0, lt=1, description="share of the documents that only evaluation sees")
    shard_tokens: int = Field(default=1 << 28, ge=1, description="a shard ends with the document that reaches it")
