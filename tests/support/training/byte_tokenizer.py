"""A tokenizer whose ids can be computed by hand: byte b is id NUM_SPECIAL + b, and nothing is merged."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, START = "<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>"
SPECIAL = (PAD, BOS, EOS, START)
PAD_ID, BOS_ID, EOS_ID, START_ID = range(4)
NUM_SPECIAL = len(SPECIAL)


def byte_tokenizer(*, template: str | None = None, vocab_size: int = 0) -> PreTrainedTokenizerFast:
    """With more ids than there are bytes, up to `vocab_size`, the others stand for nothing."""
    vocab = {token: number for number, token in enumerate(SPECIAL)}
    vocab.update({_letter(byte): NUM_SPECIAL + byte for byte in range(256)})
    vocab.update({f"unused{number}": number for number in range(len(vocab), vocab_size)})
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)
    fast.chat_template = template
    return fast


def save_byte_tokenizer(folder: Path, *, vocab_size: int = 0) -> Path:
    byte_tokenizer(vocab_size=vocab_size).save_pretrained(folder)
    return folder


def ids_of(text: str) -> list[int]:
    """A text that names special tokens as well."""
    ids: list[int] = []
    while text:
        token = next((token for token in SPECIAL if text.startswith(token)), None)
        ids += [SPECIAL.index(token)] if token else [NUM_SPECIAL + byte for byte in text[0].encode()]
        text = text[len(token) if token else 1 :]
    return ids


def bytes_of(text: str) -> list[int]:
    """A text in which special tokens are spelled, and are none."""
    return [NUM_SPECIAL + byte for byte in text.encode()]


def document_ids_of(text: str) -> list[int]:
    """A document as `prepare` writes it: what it contains is text."""
    return [BOS_ID, *bytes_of(text), EOS_ID]


def _letter(byte: int) -> str:
    """GPT-2's spelling of bytes: those that are printable in Latin-1 themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in printable].index(byte))
