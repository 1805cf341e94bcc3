"""Documents to token ids, as the server tokenizes prompts, with the end token after each."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from stellarbyte.train.data.shards import sha256_of
from stellarbyte.train.errors import TrainError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class DocumentEncoder:
    """Made from a folder with tokenizer.json and tokenizer_config.json. Raises TrainError."""

    def __init__(self, folder: Path) -> None:
        self.files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise TrainError(f"{file} does not exist; make it with stellarbyte train tokenizer.")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise TrainError(f"{file} cannot be read: {' '.join(str(error).split()).rstrip('.')}.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A text that contains the spelling of a special token must not end the document.
        self._tokenizer.encode_special_tokens = True
        names = _special_tokens(folder / "tokenizer_config.json")
        ids = {name: self._tokenizer.token_to_id(token) for name, token in names.items()}
        if (eos_token_id := ids.get("eos_token")) is None:
            raise TrainError(f"{folder / 'tokenizer_config.json'} names no eos_token of the vocabulary.")
        self.eos_token_id = eos_token_id
        self.bos_token_id, self.pad_token_id = ids.get("bos_token"), ids.get("pad_token")
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        self.sha256 = sha256_of(file.read_bytes() for file in self.files)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text with the special tokens that the tokenizer adds, and the end token once at the end."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)
        ids = (encoding.ids for encoding in encodings)
        return [np.array(each if each[-1:] == [self.eos_token_id] else [*each, self.eos_token_id]) for each in ids]


def _special_tokens(file: Path) -> dict[str, str]:
    """The names of special tokens in a tokenizer_config.json."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise TrainError(f"{file} does not exist or is not valid JSON; it names the eos_token.") from error
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = content.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    return tokens
