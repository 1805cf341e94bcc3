"""Whether a tokenizer and an embedding fit each other."""

from tokenizers import Tokenizer

NAMED_TOKENS = 5


def unembeddable_tokens(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """The tokens, in the order of their ids, that a model with `vocab_size` rows in its embedding cannot read.

    Fine-tunes that gave the tokenizer a token, [PAD] as a rule, without giving the model a row have some.
    """
    beyond = {token_id: text for text, token_id in tokenizer.get_vocab().items() if token_id >= vocab_size}
    return [beyond[token_id] for token_id in sorted(beyond)]


def mismatch(tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """One sentence about the tokens that cannot be read; None: there are none."""
    beyond = unembeddable_tokens(tokenizer, vocab_size)
    if not beyond:
        return None
    named = ", ".join(map(repr, beyond[:NAMED_TOKENS]))
    others = f" and {len(beyond) - NAMED_TOKENS} more" if len(beyond) > NAMED_TOKENS else ""
    return (
        f"The tokenizer has tokens for which the model, with {vocab_size} rows in its embedding, has none: {named}"
        f"{others}. Texts with one of them are refused."
    )
