"""The tokenizer of a Hugging Face folder, as transformers loads it. Runs no code from the folder."""

import importlib.util
import json
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stellarbyte.checkpoint.errors import CheckpointError, one_line

logger = logging.getLogger(__name__)

SENTENCEPIECE = "tokenizer.model"
OTHER_SOURCES = ("vocab.json", "tokenizer.json")  # other files with a tokenizer
SENTENCEPIECE_PACKAGES = ("sentencepiece", "google.protobuf")
DEFAULT_TEMPLATE = "default"
ADDITIONAL_TEMPLATES = "additional_chat_templates"
NOT_KEPT = (
    *("added_tokens_decoder", "auto_map", "backend", "chat_template", "is_local", "local_files_only", "merges"),
    *("merges_file", "name_or_path", "tokenizer_file", "vocab", "vocab_file"),
)


@dataclass(frozen=True, kw_only=True)
class FolderTokenizer:
    """A tokenizer in memory.

    Attributes:
        settings: tokenizer_config.json.
        chat_templates: by transformers' names; the usual one is "default".
        eos_token_id: of the eos_token in `settings`; None: absent.
    """

    folder: Path
    tokenizer: Tokenizer
    settings: dict[str, Any]
    chat_templates: dict[str, str]
    eos_token_id: int | None

    def write(self, target: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat templates into `target`."""
        self.tokenizer.save(str(target / "tokenizer.json"))
        text = json.dumps(self.settings, indent=2, ensure_ascii=False, default=str) + "\n"
        (target / "tokenizer_config.json").write_text(text, encoding="utf-8")
        for name, template in self.chat_templates.items():
            file = target / "chat_template.jinja"
            if name != DEFAULT_TEMPLATE:
                file = target / ADDITIONAL_TEMPLATES / f"{name}.jinja"
                file.parent.mkdir(exist_ok=True)
            file.write_text(template, encoding="utf-8")
        if self.chat_templates and DEFAULT_TEMPLATE not in self.chat_templates:
            names = ", ".join(sorted(self.chat_templates))
            logger.warning("warning: %s has chat templates (%s), but no default for chats.", self.folder, names)


def read_tokenizer(folder: Path) -> FolderTokenizer:
    """The tokenizer that AutoTokenizer loads from a folder, with the tokens' flags and the chat templates.

    Raises:
        CheckpointError: the folder has no tokenizer, it cannot be read, or a package for it is not installed.
    """
    _require_source(folder)
    try:
        made = _make(folder)
        tokenizer = made.backend_tokenizer
        tokenizer.no_truncation()  # a setting of the training run, which would truncate prompts
        tokenizer.no_padding()
        settings = {name: value for name, value in made.init_kwargs.items() if name not in NOT_KEPT}
        # This class uses tokenizer.json unchanged; others rebuild it from its vocabulary.
        settings |= {**made.special_tokens_map, "tokenizer_class": "PreTrainedTokenizerFast"}
        return FolderTokenizer(
            folder=folder,
            tokenizer=tokenizer,
            settings=settings,
            chat_templates=_templates(folder, made.chat_template),
            eos_token_id=made.eos_token_id,
        )
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises plain Exception, and transformers' classes various ones
        raise CheckpointError(f"{folder} has no tokenizer that can be read: {one_line(error)}.") from error


def _make(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of AutoTokenizer's class, or of tokenizer.json if that class needs other code or packages."""
    try:
        made = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if isinstance(made, PreTrainedTokenizerFast):
            return made
    except (ValueError, ImportError):
        if not (folder / "tokenizer.json").is_file():
            raise
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _require_source(folder: Path) -> None:
    if any((folder / name).is_file() for name in OTHER_SOURCES):
        return
    if not (folder / SENTENCEPIECE).is_file():
        raise CheckpointError(f"{folder} has no tokenizer: neither tokenizer.json nor {SENTENCEPIECE} is there.")
    if not all(_is_installed(package) for package in SENTENCEPIECE_PACKAGES):
        raise CheckpointError(
            f"{folder} has its tokenizer only as {SENTENCEPIECE}; to read it, install the extra packages: "
            f"{sys.executable} -m pip install sentencepiece protobuf."
        )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # for a missing parent package
        return False


def _templates(folder: Path, given: str | dict[str, str] | None) -> dict[str, str]:
    templates = {DEFAULT_TEMPLATE: given} if isinstance(given, str) else dict(given or {})
    for name, template in templates.items():
        if not re.fullmatch(r"\w[\w.-]{0,99}", name) or not isinstance(template, str):
            raise CheckpointError(f"{folder} has the chat template {name!r:.100}, which cannot be stored as a file.")
    return templates
