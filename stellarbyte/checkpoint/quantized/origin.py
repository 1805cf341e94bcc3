"""The format that a converted checkpoint's weights were quantized in, in a file beside them."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.safetensors_file import read_json

ORIGIN_FILE = "quantization.json"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Attributes: format: for people; notes: sentences about what is not served as the source said."""

    format: str
    notes: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        (folder / ORIGIN_FILE).write_text(text + "\n", encoding="utf-8")


def read_origin(folder: Path) -> Origin | None:
    """Of a checkpoint's folder; None: its source was not quantized.

    Raises:
        CheckpointError: the file is not one.
    """
    if not (folder / ORIGIN_FILE).is_file():
        return None
    content = read_json(folder / ORIGIN_FILE)
    notes = content.get("notes")
    if not isinstance(content.get("format"), str) or not isinstance(notes, list):
        raise CheckpointError(f"{folder / ORIGIN_FILE} was not written by stellarbyte convert.")
    return Origin(format=content["format"], notes=tuple(map(str, notes)))
