"""How a model sets its reasoning apart, found in its tokenizer and its chat template: by marks, or in channels."""

from tokenizers import Tokenizer

from stellarbyte_server.protocol.request import Channels, Reasoning
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


_START, _CHANNEL, _MESSAGE, _END = _CHANNEL_MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
_CONSTRAIN, _FINAL = "<|constrain|>", ("<|return|>", "<|call|>")


def find_marks(tokenizer: Tokenizer, template_source: str | None, vocab_size: int) -> Reasoning | Channels | None:
    """The channels of the model's messages, or the marks of its reasoning; None: it has neither.

    A model has channels if its vocabulary has their marks as special tokens, and its chat template the messages of an
    assistant in them. It has a pair of marks if both are added tokens of its vocabulary, or if its chat template
    contains both.
    """
    added = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    source = "" if template_source is None else template_source
    if _CHANNEL in source and (channels := _channels(tokenizer, added, vocab_size)) is not None:
        return channels
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


def _channels(tokenizer: Tokenizer, added: dict[str, int], vocab_size: int) -> Channels | None:
    """None: a mark is no token of the model, or the tokenizer cannot write a header."""
    special = token_bytes_of(tokenizer).special_ids  # grammars tell these tokens from text
    known = {mark: token_id for mark, token_id in added.items() if token_id in special and token_id < vocab_size}
    if not all(mark in known for mark in _CHANNEL_MARKS):
        return None
    token_ids: list[tuple[int, ...]] = []
    for name in ("assistant", "analysis", "commentary"):
        ids = tuple(tokenizer.encode(name, add_special_tokens=False).ids)
        written = b"".join(token_bytes_of(tokenizer)[token_id] for token_id in ids)
        if max(ids, default=vocab_size) >= vocab_size or written != name.encode():
            return None
        token_ids.append(ids)
    role, analysis, commentary = token_ids
    return Channels(
        start_id=known[_START],
        channel_id=known[_CHANNEL],
        message_id=known[_MESSAGE],
        end_id=known[_END],
        final_ids=tuple(known[mark] for mark in _FINAL if mark in known),
        constrain_id=known.get(_CONSTRAIN),
        role_token_ids=role,
        analysis_token_ids=analysis,
        commentary_token_ids=commentary,
    )
