"""What a tokenizer does with texts that it did not learn from, by kind of text."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from stellarbyte.train.config.yaml_file import Section
from stellarbyte.train.data.files import SourceFile
from stellarbyte.train.tokenizer.sampler import parts, sample

MAX_BYTES = 1 << 22  # of each kind


class KindReport(Section):
    """Attributes:
    is_learned: the kind has too little text to keep some aside, so this is text that tokens were learned from.
    changed_texts: that are not the same after encoding and decoding.
    unknown_tokens: tokens for what the vocabulary cannot spell.
    """

    texts: int
    bytes: int
    characters: int
    tokens: int
    is_learned: bool
    changed_texts: int
    unknown_tokens: int

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    @property
    def characters_per_token(self) -> float:
        return self.characters / self.tokens


class Report(Section):
    vocabulary: int
    kinds: dict[str, KindReport]


def report(tokenizer: Tokenizer, files: Sequence[SourceFile]) -> Report:
    """Kinds without any text are left out."""
    kinds = dict.fromkeys(file.source.kind for file in files)
    found = {kind: _of_kind(tokenizer, [file for file in files if file.source.kind == kind]) for kind in kinds}
    return Report(
        vocabulary=tokenizer.get_vocab_size(), kinds={kind: made for kind, made in found.items() if made is not None}
    )


def _of_kind(tokenizer: Tokenizer, files: Sequence[SourceFile]) -> KindReport | None:
    for of_report in (True, False):
        texts = sample((text for _, text in parts(files, of_report=of_report)), MAX_BYTES)
        if texts:
            return _counted(tokenizer, texts, is_learned=not of_report)
    return None


def _counted(tokenizer: Tokenizer, texts: Sequence[str], *, is_learned: bool) -> KindReport:
    was_spelled, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    encoded = [each.ids for each in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    tokenizer.encode_special_tokens = was_spelled
    decoded = tokenizer.decode_batch(encoded, skip_special_tokens=False)
    unknown = tokenizer.token_to_id(name) if (name := getattr(tokenizer.model, "unk_token", None)) else None
    return KindReport(
        texts=len(texts),
        bytes=sum(len(text.encode()) for text in texts),
        characters=sum(map(len, texts)),
        tokens=sum(map(len, encoded)),
        is_learned=is_learned,
        changed_texts=sum(before != after for before, after in zip(texts, decoded, strict=True)),
        unknown_tokens=sum(ids.count(unknown) for ids in encoded) if unknown is not None else 0,
    )
