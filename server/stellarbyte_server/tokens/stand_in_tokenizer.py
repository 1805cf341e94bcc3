"""A tokenizer for a model that has none: every id has a text, but no text has ids.

With --load-format dummy a folder needs nothing but config.json; answers shall still be texts of a usual length.
"""

from tokenizers import Tokenizer, decoders, models

_SPACE = "Ġ"  # as byte-level vocabularies write it


def make_stand_in_tokenizer(vocab_size: int) -> Tokenizer:
    """Token 123 is the text " 123". Of the byte-level kind, as the tokenizers of Llama 3 and Qwen are."""
    vocabulary = {f"{_SPACE}{token_id}": token_id for token_id in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=f"{_SPACE}0"))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
