"""The text that a model is observed on: read, turned into tokens, and shown token by token."""

import unicodedata
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tokenizers import Tokenizer

from stellarbyte.analysis.errors import AnalysisError
from stellarbyte.checkpoint.errors import CheckpointError, one_line
from stellarbyte.config import ByteModelConfig

MAX_TEXT_BYTES = 65_536
LABEL_CHARACTERS = 12
_SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥"}
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs", "Mn", "Me", "Mc")  # categories of Unicode


@dataclass(frozen=True, kw_only=True)
class Text:
    """Attributes: name: of its file; None: given on the command line. content: not empty."""

    name: str | None
    content: str

    @property
    def num_bytes(self) -> int:
        return len(self.content.encode())


@dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """A text as a model reads it.

    Attributes:
        ids: of the tokens, after the first one or more that are special (as a beginning of sequence), if the tokenizer
            puts such before a text.
        num_special: how many of `ids` those are.
        num_unknown: tokens that stand for text which the tokenizer does not know.
        labels: what each token shows: its text with signs for white space, or #ID for a part of a character.
    """

    text: Text
    ids: tuple[int, ...]
    num_special: int
    num_unknown: int
    labels: tuple[str, ...]


def read_text(given: str | None, language: str) -> Text:
    """The file of that path, or else the words themselves; None: the sample of the language ("en" or "zh").

    Raises:
        AnalysisError: the text is empty, too long, or not UTF-8.
    """
    if given is None:
        name = f"sample.{language}.txt"
        return Text(name=name, content=(files("stellarbyte.analysis") / "samples" / name).read_text(encoding="utf-8"))
    file = _file(given)
    if file is None:
        text = Text(name=None, content=given)
    else:
        try:
            with file.open("rb") as stream:
                raw = stream.read(MAX_TEXT_BYTES + 1)
            text = Text(
                name=file.name, content=raw[:MAX_TEXT_BYTES].decode("utf-8") if len(raw) <= MAX_TEXT_BYTES else ""
            )
        except OSError as error:
            raise AnalysisError(f"{file} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise AnalysisError(f"{file} is not UTF-8 text: its byte {error.start} fits no character.") from error
        if len(raw) > MAX_TEXT_BYTES:
            raise AnalysisError(f"{file} has more than {MAX_TEXT_BYTES:,} bytes; give a shorter text.")
    if not text.content.strip():
        raise AnalysisError(f"The text {'in --text' if file is None else f'of {file}'} is empty; give at least a word.")
    if text.num_bytes > MAX_TEXT_BYTES:
        raise AnalysisError(f"The text in --text has more than {MAX_TEXT_BYTES:,} bytes; give a shorter text.")
    return text


def _file(given: str) -> Path | None:
    try:
        return Path(given) if Path(given).is_file() else None
    except (OSError, ValueError):  # too long for a path, or with a character that none has
        return None


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """None: the checkpoint has none.

    Raises:
        CheckpointError: its tokenizer.json cannot be read.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}.") from error


def tokenize(text: Text, tokenizer: Tokenizer, config: ByteModelConfig) -> TokenizedText:
    """Special tokens that the tokenizer puts after a text are left out.

    Raises:
        AnalysisError: fewer than two tokens, or one without an embedding.
    """
    encoded = tokenizer.encode(text.content)
    flags = encoded.special_tokens_mask
    num_special = next((i for i, flag in enumerate(flags) if not flag), len(flags))
    end = len(flags) - next((i for i, flag in enumerate(reversed(flags)) if not flag), 0)
    ids = tuple(encoded.ids[:end])
    if len(ids) < 2:
        raise AnalysisError(f"The text is {len(ids)} token for this model; give one of at least two.")
    if (largest := max(ids)) >= config.vocab_size:
        raise AnalysisError(
            f"The text contains the token {tokenizer.id_to_token(largest)!r} (id {largest}), but the model has "
            f"embeddings for only {config.vocab_size} tokens."
        )
    unknown = getattr(tokenizer.model, "unk_token", None)
    unknown_id = None if unknown is None else tokenizer.token_to_id(unknown)
    return TokenizedText(
        text=text,
        ids=ids,
        num_special=num_special,
        num_unknown=0 if unknown_id is None else ids.count(unknown_id),
        labels=tuple(_label(tokenizer, token_id) for token_id in ids),
    )


def _label(tokenizer: Tokenizer, token_id: int) -> str:
    decoded = tokenizer.decode([token_id], skip_special_tokens=False)
    if not decoded or "\N{REPLACEMENT CHARACTER}" in decoded:
        return f"#{token_id}"
    shown = "".join(map(_visible, decoded))
    return shown if len(shown) <= LABEL_CHARACTERS else f"{shown[: LABEL_CHARACTERS - 1]}…"


def _visible(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    return escaped(character) if unicodedata.category(character) in _INVISIBLE else character


def escaped(character: str) -> str:
    """The character as U+ and its number."""
    return f"U+{ord(character):04X}"
