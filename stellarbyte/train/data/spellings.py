"""Texts of messages that spell special tokens: kept text where a chat template writes special tokens around them."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

# Private-use characters, which stand for special token k as often as its spelling has characters: places stay the same
_IN_MESSAGES, _BY_TEMPLATE = 0xF0000, 0x100000
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")

Span = tuple[int, int]  # characters of a text


class Spellings:
    """The special tokens of one tokenizer as they are spelled.

    `hide` takes their spellings out of messages, the chat template writes its own around them, and `encode` takes only
    those of the template for special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        longest_first = sorted(self._texts, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first))) if self._texts else None
        self._copy: Tokenizer | None = None

    def hide(self, value: Any) -> Any:
        """A copy of nested lists and objects in whose texts no special token is spelled.

        Raises:
            ValueError: a text spells one and another has characters that stand for it; the end of a sentence.
        """
        hidden = self._hidden(value)
        if hidden != value and _PRIVATE.search(json.dumps(value, ensure_ascii=False)):
            raise ValueError("spells a special token beside private-use characters (U+F0000 and above): remove them")
        return hidden

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids of a rendered chat, with what `hide` has hidden as text, and the characters of each token."""
        if self._copy is None:
            self._copy = self._respelled()
        text = self._written(text, _BY_TEMPLATE)
        for number, spelling in enumerate(self._texts):
            text = text.replace(_stand_in(_IN_MESSAGES, number, spelling), spelling)
        encoding = self._copy.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _hidden(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._written(value, _IN_MESSAGES)
        if isinstance(value, Mapping):
            return {key: self._hidden(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self._hidden(item) for item in value]
        return value

    def _written(self, text: str, start: int) -> str:
        """The text with private-use characters in the place of every spelling."""
        if self._any is None:
            return text
        return self._any.sub(lambda found: _stand_in(start, self._texts.index(found[0]), found[0]), text)

    def _respelled(self) -> Tokenizer:
        """The tokenizer with special tokens that are spelled as `_BY_TEMPLATE` says; their ids are the same."""
        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        new = {text: _stand_in(_BY_TEMPLATE, number, text) for number, text in enumerate(self._texts)}
        for token in content["added_tokens"]:
            token["content"] = new.get(token["content"], token["content"])
        model = content["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {new.get(text, text): number for text, number in model["vocab"].items()}
        else:  # of a unigram model: pieces with their scores
            model["vocab"] = [[new.get(text, text), score] for text, score in model["vocab"]]
        if model.get("unk_token") in new:
            model["unk_token"] = new[model["unk_token"]]
        content["post_processor"] = None  # it would add special tokens by their names
        return Tokenizer.from_str(json.dumps(content))


def _stand_in(start: int, number: int, spelling: str) -> str:
    return chr(start + number) * len(spelling)
