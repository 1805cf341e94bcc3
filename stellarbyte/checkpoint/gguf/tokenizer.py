"""Rebuilds a tokenizer from GGUF metadata, as llama.cpp would use it.

transformers can do this, too, but treats unknown pre-tokenizers as GPT-2's: SmolLM2 would then read "2024" as one
piece, although it was trained on four. Here an unknown pre-tokenizer is refused by name.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import generate_merges

from stellarbyte.checkpoint.errors import CheckpointError

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (  # Mistral NeMo
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")  # llama.cpp's "default"


@dataclass(frozen=True, kw_only=True)
class _ByteLevelStyle:
    """How one family of byte-level vocabularies splits text before merging; the splits are applied in turn."""

    splits: Sequence[str]
    is_nfc: bool = False
    ignores_merges: bool = False  # a piece that is a token is not split
    adds_bos: bool = False  # default, if the file does not set it


_LLAMA3 = _ByteLevelStyle(splits=(LLAMA3_SPLIT,), ignores_merges=True, adds_bos=True)
_SINGLE_DIGITS = _ByteLevelStyle(splits=(r"\p{N}", GPT2_SPLIT))
STYLES = {  # by tokenizer.ggml.pre: those used with the supported architectures
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _ByteLevelStyle(splits=(QWEN2_SPLIT,), is_nfc=True),
    "deepseek-r1-qwen": _ByteLevelStyle(splits=(QWEN2_SPLIT,)),
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "gpt-2": _ByteLevelStyle(splits=(GPT2_SPLIT,)),
    "tekken": _ByteLevelStyle(splits=(TEKKEN_SPLIT,), ignores_merges=True, adds_bos=True),
    "default": _ByteLevelStyle(splits=DEFAULT_SPLITS),
}
# Tokens with these texts end an answer in llama.cpp, in addition to those that the file names.
END_TEXTS = frozenset(
    "<|im_end|> <|eot_id|> <|eom_id|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|>"
    " <|end_of_text|> </s> <EOT> _<EOT> [EOT] [EOS] <end_of_utterance> <｜end▁of▁sentence｜>"
    # Fill-in-the-middle tokens, which also end an answer.
    " <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>"
    " <|file_sep|>".split()
)
END_IDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")  # of tokenizer.ggml.…_token_id
NO_TOKEN = 2**32 - 1  # -1: the file's value for an absent token


class TokenType(IntEnum):
    """tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class PlannedTokenizer:
    """A tokenizer in memory. `settings` is tokenizer_config.json; `token_ids` has bos, eos and pad, if known."""

    tokenizer: Tokenizer
    settings: Mapping[str, Any]
    token_ids: dict[str, Any]
    chat_template: str | None

    def write(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))
        settings = json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def plan_tokenizer(path: Path, metadata: Mapping[str, Any]) -> PlannedTokenizer:
    """The tokenizer that a file's metadata describes.

    Raises:
        CheckpointError: the file has no tokenizer, or one of an unsupported kind, which the message names.
    """
    fields = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.") and not (key.endswith("_token_id") and value == NO_TOKEN)
    }
    tokens = fields.get("tokens")
    if not isinstance(tokens, list) or "model" not in fields:
        raise CheckpointError(f"{path} has no tokenizer in its metadata.")
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path} is corrupt: its chat template is not text.")
    types = fields.get("token_type", [TokenType.NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise CheckpointError(f"{path} is corrupt: it has {len(tokens)} tokens and {len(types)} token types.")
    match fields["model"]:
        case "gpt2":
            tokenizer, adds_bos = _byte_level(path, fields, tokens)
        case "llama":
            tokenizer, adds_bos = _sentencepiece(path, fields, tokens, types), True
        case other:
            raise CheckpointError(f"{path} has a tokenizer of type {other!r}; supported are gpt2 and llama.")
    for name, value in fields.items():
        if name.endswith("_token_id") and not 0 <= value < len(tokens):
            raise CheckpointError(f"{path} is corrupt: its {name} is {value}, but it has {len(tokens)} tokens.")
    adds_bos = fields.get("add_bos_token", adds_bos)
    adds_eos = fields.get("add_eos_token", False)
    _add_whole_tokens(tokenizer, tokens, types)
    names = {}
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        token_id = fields.get(f"{key}_token_id")
        if token_id is not None:
            names[name] = tokens[token_id]
    _add_post_processor(tokenizer, names.get("bos") if adds_bos else None, names.get("eos") if adds_eos else None)
    return PlannedTokenizer(
        tokenizer=tokenizer,
        settings={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": adds_bos and "bos" in names,
            "add_eos_token": adds_eos and "eos" in names,
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": token for name, token in names.items()},
        },
        token_ids=_token_ids(fields, tokens),
        chat_template=template,
    )


def _token_ids(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """bos, eos and pad ids under their config names; eos is every id that ends an answer in llama.cpp."""
    ends = [fields.get(f"{name}_token_id") for name in END_IDS]
    ends += [index for index, token in enumerate(tokens) if token in END_TEXTS]
    eos = list(dict.fromkeys(index for index in ends if index is not None))
    ids = {
        "bos_token_id": fields.get("bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": fields.get("padding_token_id"),
    }
    return {name: value for name, value in ids.items() if value is not None}


def _byte_level(path: Path, fields: Mapping[str, Any], tokens: list[str]) -> tuple[Tokenizer, bool]:
    """GPT-2's byte-level BPE, and whether its family starts with BOS by default."""
    if "pre" not in fields:
        raise CheckpointError(f"{path} does not say how to split text: tokenizer.ggml.pre is missing (an old file).")
    style = STYLES.get(fields["pre"])
    if style is None:
        raise CheckpointError(
            f"{path} has the pre-tokenizer {fields['pre']!r}; supported are {', '.join(sorted(STYLES))}."
        )
    if "merges" not in fields:
        raise CheckpointError(f"{path} has no tokenizer.ggml.merges in its metadata.")
    merges = [_split_merge(merge) for merge in fields["merges"]]
    tokenizer = Tokenizer(_bpe(path, tokens, merges, ignore_merges=style.ignores_merges))
    if style.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in style.splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, style.adds_bos


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge[1:].partition(" ")  # the left part is not empty, so the first character belongs to it
    return merge[:1] + left, right


def _sentencepiece(path: Path, fields: Mapping[str, Any], tokens: list[str], types: Sequence[int]) -> Tokenizer:
    """SentencePiece's BPE with byte fallback; a space is added before each contiguous text, as in llama.cpp."""
    scores = fields.get("scores", [])
    if len(scores) != len(tokens):
        raise CheckpointError(f"{path} is corrupt: it has {len(tokens)} tokens and {len(scores)} token scores.")
    mergeable = {token: index for index, token in enumerate(tokens) if types[index] == TokenType.NORMAL}
    merges = generate_merges(mergeable, {token: scores[index] for token, index in mergeable.items()})
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), None)
    tokenizer = Tokenizer(_bpe(path, tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([*space, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence(space)
    return tokenizer


def _bpe(path: Path, tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for left, right in merges:
        if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
            raise CheckpointError(f"{path} is corrupt: its merge {left!r} + {right!r} is not made of tokens.")
    return models.BPE(vocab=vocabulary, merges=merges, **options)


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], types: Sequence[int]) -> None:
    """Tokens that are matched in text before merging; control tokens are also omitted from decoded text."""
    pairs = list(zip(tokens, types, strict=True))
    is_control = {token: kind == TokenType.CONTROL or token in END_TEXTS for token, kind in pairs}
    controls = [AddedToken(token, normalized=False, special=True) for token, _ in pairs if is_control[token]]
    users = [
        AddedToken(token, normalized=False)
        for token, kind in pairs
        if kind == TokenType.USER_DEFINED and not is_control[token]
    ]
    tokenizer.add_special_tokens(controls)
    tokenizer.add_tokens(users)


def _add_post_processor(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    if bos is None and eos is None:
        return
    single = [*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])]
    pair = [*single, *(piece.replace("$A", "$B") for piece in single)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[
            (token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token is not None
        ],
    )
