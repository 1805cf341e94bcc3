"""The bytes of each token of a vocabulary."""

import functools
import re
from collections.abc import Mapping

from tokenizers import Tokenizer, decoders

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class TokenBytes:
    """The bytes of single tokens. Made once for a tokenizer; any thread may read it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._bytes_of: dict[int, bytes] = {}
        byte_of = _byte_level_alphabet()
        for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
            # Byte-level decoders decode added tokens, too, if these are in their alphabet.
            if is_byte_level:
                self._bytes_of[token_id] = _byte_level(token, byte_of)
            else:
                self._bytes_of[token_id] = token.encode() if token_id in added else _sentencepiece(token)

    def __getitem__(self, token_id: int) -> bytes:
        """b"" for ids without a token: checkpoints pad the vocabulary."""
        return self._bytes_of.get(token_id, b"")

    def without_special(self) -> Mapping[int, bytes]:
        return {token_id: text for token_id, text in self._bytes_of.items() if token_id not in self.special_ids}

    def with_special(self) -> Mapping[int, bytes]:
        return self._bytes_of

    def name(self, token_id: int) -> str:
        """The token as text; if it is not valid UTF-8, its bytes as `bytes:\\xe2\\x82`, so that names are unique."""
        content = self[token_id]
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{value:02x}" for value in content)


@functools.lru_cache(maxsize=8)
def token_bytes_of(tokenizer: Tokenizer) -> TokenBytes:
    """The bytes of a tokenizer's tokens; the tokenizer must not change afterwards."""
    return TokenBytes(tokenizer)


def _byte_level(token: str, byte_of: Mapping[str, int]) -> bytes:
    if all(character in byte_of for character in token):
        return bytes(byte_of[character] for character in token)
    return token.encode()


def _sentencepiece(token: str) -> bytes:
    """The bytes of a SentencePiece token: ▁ is a space, <0x..> a byte."""
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte is not None else token.replace("▁", " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: the byte itself if printable, else one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
