"""A tokenizer for a model without one: it decodes ids and does not encode text.

With --load-format dummy a folder needs only config.json, and answers should still have texts of a usual length.
"""

from tokenizers import Tokenizer, decoders, models

_SPACE = "Ġ"  # a space in byte-level vocabularies


def make_stand_in_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level tokenizer, as of Llama 3 and Qwen, in which token 123 is the text " 123"."""
    vocabulary = {f"{_SPACE}{token_id}": token_id for token_id in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=f"{_SPACE}0"))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
