"""The rows of a run, from the data section of its file."""

from collections.abc import Mapping
from functools import partial

from transformers import PreTrainedTokenizerFast

from stellarbyte.checkpoint.native import load_config
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.lora.config import MAX_INVOCATION_TOKENS
from stellarbyte.train.config.run import ChatData, Lora, LoraRun, Model, Pretrain, Sft, TokenData
from stellarbyte.train.data.packing import collate
from stellarbyte.train.data.sft import Chats, read_chats
from stellarbyte.train.data.shards import SPLITS, Split, read_index, sha256_of
from stellarbyte.train.data.tokens import Layout, TokenSequences
from stellarbyte.train.errors import TrainError
from stellarbyte.train.rows import RunData

TokenizedChats = Mapping[Split, Chats]


def token_rows(config: Pretrain) -> RunData:
    """Rows of token shards. Raises TrainError: the folder is not complete."""
    data = config.data
    index = read_index(data.shards)
    held_out = index.splits.get("held_out")
    has_held_out = held_out is not None and held_out.tokens > 0
    return RunData(
        train=TokenSequences(data.shards, "train", data.sequence, _layout(data)),
        held_out=TokenSequences(data.shards, "held_out", data.sequence, _layout(data)) if has_held_out else None,
        collate=collate,
        fingerprint=index.fingerprint,
        licenses=tuple(sorted({source.license for source in index.sources})),
        bytes_per_token=held_out.text_bytes / held_out.tokens if held_out is not None and has_held_out else None,
        tokenizer=data.shards / "tokenizer",
        special_ids={
            "pad_token_id": index.pad_token_id,
            "bos_token_id": index.bos_token_id,
            "eos_token_id": index.eos_token_id,
        },
        vocab_size=index.vocab_size,
    )


def chat_rows(config: Sft) -> RunData:
    """Rows of chats, by the tokenizer and the chat template of the model.

    Raises:
        TrainError: a file or a chat in it cannot be used.
        CheckpointError: there is no such model.
    """
    tokenizer, chats = tokenized_chats(config.model, config.data, config.lora if isinstance(config, LoraRun) else None)
    return rows_of_chats(config, tokenizer, chats)


def tokenized_chats(
    model: Model, data: ChatData, lora: Lora | None = None
) -> tuple[PreTrainedTokenizerFast, TokenizedChats]:
    """The tokenizer of a run's model, and its chats, each cut after data.sequence tokens. Raises as `chat_rows`."""
    assert model.path is not None  # Sft checks it
    tokenizer = PreTrainedTokenizerFast.from_pretrained(resolve_model(model.path), local_files_only=True)
    if data.template is not None:
        try:
            tokenizer.chat_template = data.template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TrainError(f"data.template {data.template} cannot be read as text.") from error
    read = partial(read_chats, tokenizer=tokenizer, max_length=data.sequence, invocation=_invocation(lora, tokenizer))
    chats = read(data.chats, held_out=data.held_out)
    if data.validation:
        validation = read(data.validation)
        chats["held_out"] = validation["train"]
    return tokenizer, chats


def rows_of_chats(config: Sft, tokenizer: PreTrainedTokenizerFast, chats: TokenizedChats) -> RunData:
    """Rows of chats of at most data.sequence tokens. Raises TrainError: none is to be trained on."""
    data = config.data
    assert config.model.path is not None  # Sft checks it
    folder = resolve_model(config.model.path)
    rows = {
        split: chats[split].rows(tokenizer, length=data.sequence, packing=data.packing)
        for split in SPLITS
        if len(chats[split].ends)
    }
    if "train" not in rows:
        raise TrainError(f"data.chats holds no chat to train on{'; all are held out' if rows else ''}.")
    return RunData(
        train=rows["train"],
        held_out=rows.get("held_out"),
        collate=collate,
        fingerprint=sha256_of(chats[split].fingerprint.encode() for split in SPLITS),
        licenses=(data.license,),
        bytes_per_token=None,
        tokenizer=folder,
        vocab_size=load_config(folder).vocab_size,
        special_ids={},
        invocation=_invocation(config.lora if isinstance(config, LoraRun) else None, tokenizer),
    )


def _invocation(lora: Lora | None, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...] | None:
    """The tokens from which on an activated adapter acts; special tokens may be spelled."""
    if lora is None or lora.invocation is None:
        return None
    if not isinstance(lora.invocation, str):
        return tuple(lora.invocation)
    tokens = tuple(tokenizer(lora.invocation, add_special_tokens=False)["input_ids"])
    if not 0 < len(tokens) <= MAX_INVOCATION_TOKENS:
        raise TrainError(f"lora.invocation has {len(tokens)} tokens; it must have 1 to {MAX_INVOCATION_TOKENS}.")
    return tokens


def _layout(data: TokenData) -> Layout:
    if not data.packing:
        return "single"
    return "cut" if data.cut else "whole"
