"""The section that names texts: files, what in them is a document, and its kind and licence."""

import string
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from stellarbyte.train.config.yaml_file import Section

Format = Literal["text", "jsonl", "json", "parquet"]
_FORMAT_OF: dict[str, Format] = {
    ".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet",
}  # fmt: skip
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


class Source(Section):
    """Files of one form. Documents come in the order of `files`, those of a pattern in the order of their names."""

    files: list[str] = Field(min_length=1, description="paths, or patterns such as data/**/*.jsonl.gz")
    format: Format | None = Field(default=None, description="absent: as the file's name ends")
    field: str = Field(default="text", min_length=1, description="of objects and rows: text, meta.body")
    template: str | None = Field(default=None, description="instead of field: '{title}\\n{paragraphs}'")
    separator: str | None = Field(default=None, min_length=1, description="text files only: stands between documents")
    kind: str = Field(default="text", min_length=1, description="a name, such as code or zh; reports count by kind")
    license: str = Field(default="not stated", min_length=1, description="of the texts; kept with the data")

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str | None) -> str | None:
        if template is not None:
            template_fields(template)
        return template

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.template is not None and "field" in self.model_fields_set:
            raise ValueError("field and template exclude each other")
        return self

    def format_of(self, file: Path) -> Format:
        """The form of a file's content. ValueError if its name does not say it."""
        if self.format is not None:
            return self.format
        name = file.with_suffix("") if file.suffix in COMPRESSIONS else file
        if name.suffix not in _FORMAT_OF:
            raise ValueError(f"{file} does not end with {', '.join(_FORMAT_OF)}; say which with format")
        return _FORMAT_OF[name.suffix]


def template_fields(template: str) -> list[tuple[str, str | None]]:
    """The parts of a template: a text, and the field that follows it (None: the end). ValueError if it is none."""
    parts = [(text, field) for text, field, _, _ in string.Formatter().parse(template)]
    for _, field, specification, conversion in string.Formatter().parse(template):
        if field == "" or specification or conversion:
            raise ValueError("a template has fields such as {title} only; braces of the text are written twice")
    if all(field is None for _, field in parts):
        raise ValueError("the template names no field, such as {title}")
    return parts
