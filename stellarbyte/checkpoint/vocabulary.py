"""Compares a tokenizer's vocabulary with a model's embedding."""

from tokenizers import Tokenizer

NAMED_TOKENS = 5


def unembeddable_tokens(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """The tokens, in the order of their ids, without an embedding in a model with `vocab_size` rows.

    Some fine-tunes added a token, usually [PAD], to the tokenizer but not to the model.
    """
    beyond = {token_id: text for text, token_id in tokenizer.get_vocab().items() if token_id >= vocab_size}
    return [beyond[token_id] for token_id in sorted(beyond)]


def mismatch(tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """One sentence about the tokens without an embedding; None if all have one."""
    beyond = unembeddable_tokens(tokenizer, vocab_size)
    if not beyond:
        return None
    named = ", ".join(map(repr, beyond[:NAMED_TOKENS]))
    others = f" and {len(beyond) - NAMED_TOKENS} more" if len(beyond) > NAMED_TOKENS else ""
    return (
        f"The tokenizer has tokens for which the model, with {vocab_size} rows in its embedding, has none: {named}"
        f"{others}. Texts with one of them are refused."
    )
