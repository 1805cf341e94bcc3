"""The marks that a model writes around its reasoning, found in its tokenizer and its chat template."""

from tokenizers import Tokenizer

from stellarbyte_server.protocol.request import Reasoning
from stellarbyte_server.tokens.token_bytes import token_bytes_of

# Known pairs; the first that a model has is used. A mark is ASCII, and its first character must not recur in it.
_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<reason>", "</reason>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
)


def find_marks(tokenizer: Tokenizer, template_source: str | None, vocab_size: int) -> Reasoning | None:
    """The marks of the model's reasoning; None: it has none.

    A model has a pair of marks if both are added tokens of its vocabulary, or if its chat template contains both.
    """
    added = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    source = "" if template_source is None else template_source
    known = [marks for marks in _MARKS if all(added.get(mark, vocab_size) < vocab_size for mark in marks)]
    known += [marks for marks in _MARKS if all(mark in source for mark in marks)]
    return next((found for marks in known if (found := _reasoning(tokenizer, marks, added, vocab_size))), None)


def _reasoning(
    tokenizer: Tokenizer, marks: tuple[str, str], added: dict[str, int], vocab_size: int
) -> Reasoning | None:
    """None: the tokenizer cannot write the marks."""
    token_ids = [tuple(tokenizer.encode(mark, add_special_tokens=False).ids) for mark in marks]
    for mark, ids in zip(marks, token_ids, strict=True):
        written = b"".join(token_bytes_of(tokenizer)[token_id] for token_id in ids)
        if max(ids, default=vocab_size) >= vocab_size or written.strip() != mark.encode():
            return None
    return Reasoning(
        start=marks[0],
        end=marks[1],
        start_token_ids=token_ids[0],
        end_token_ids=token_ids[1],
        start_id=added.get(marks[0]),
        end_id=added.get(marks[1]),
    )
