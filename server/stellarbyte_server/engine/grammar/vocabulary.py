"""A model's tokens in the grammar library's form."""

import json
import threading

from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from stellarbyte_server.tokens.token_bytes import TokenBytes

# Limit of tokenization of forced text: of all that is forced, which can be long, only the beginning is of use.
MIN_FORCED_CHARACTERS = 256
SURE_SHARE = 0.5  # of these characters: tokens within them do not depend on those after the limit


class GrammarVocabulary:
    """The tokenizer for llguidance, created on first use because that takes a second."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        known = max(tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps
        self._eos_token_ids = sorted(token_id for token_id in eos_token_ids if token_id < min(known, vocab_size))
        self._num_tokens = max(vocab_size, known)
        if not self._eos_token_ids:  # llguidance needs one: an id beyond all masks
            self._eos_token_ids = [self._num_tokens]
            self._num_tokens += 1
        self.num_words = (self._num_tokens + 31) // 32
        self._source = tokenizer
        self._made: LLTokenizer | None = None
        self._tokens: _Tokens | None = None
        self._making = threading.Lock()

    def num_sure(self, token_ids: list[int]) -> int:
        """How many of the tokens of a forced text, from the first on, are those of the whole text, and among the
        model's. The last ones may come from a word that the limit of tokenization has cut."""
        self.tokenizer()
        assert self._tokens is not None
        left = SURE_SHARE * self._tokens.max_characters
        for count, token_id in enumerate(token_ids):
            left -= len(self._tokens.tokens[token_id])
            if token_id >= self.vocab_size or (count and left < 0):
                return count
        return len(token_ids)

    def tokenizer(self) -> LLTokenizer:
        """The tokenizer, on any thread. Raises llguidance's exceptions if it cannot read the tokenizer."""
        with self._making:
            if self._made is None:
                plain = Tokenizer.from_str(self._source.to_str())
                plain.no_padding()
                plain.no_truncation()
                self._tokens = _Tokens(plain, self._eos_token_ids[0], self._num_tokens)
                wrapped = TokenizerWrapper(self._tokens)
                self._made = LLTokenizer(wrapped, n_vocab=self._num_tokens, eos_token=self._eos_token_ids)
            return self._made


class _Tokens:
    """The tokens for llguidance, in place of the tokenizer's JSON.

    From the JSON it would treat every added token in angle brackets, such as Qwen's <tool_call>, as a special token,
    which grammars of text do not allow.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int, num_tokens: int) -> None:
        known = TokenBytes(tokenizer)
        self.eos_token_id = eos_token_id
        self.tokens = [known[token_id] for token_id in range(num_tokens)]
        self.special_token_ids = sorted(known.special_ids)
        self._encoder = _without_special_tokens(tokenizer)
        # It starts with the previous token, and omits the end of the text, which could become another token.
        self.max_characters = max(MIN_FORCED_CHARACTERS, 4 * max(map(len, self.tokens)))

    def __call__(self, text: bytes | str) -> list[int]:
        """The tokens of a text that the grammar forces, or of its beginning."""
        text = text if isinstance(text, str) else text.decode()
        return self._encoder.encode(text[: self.max_characters], add_special_tokens=False).ids


def _without_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that encodes the names of special tokens as text."""
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict):
        for token in content["added_tokens"]:
            vocabulary.setdefault(token["content"], token["id"])  # otherwise the others would get new ids
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    return Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
