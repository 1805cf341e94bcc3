"""Tokenizers rebuilt from GGUF metadata cut and join text as their models were trained to."""

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from stellarbyte.checkpoint.demo import find_demo_gguf
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.gguf.file import open_gguf
from stellarbyte.checkpoint.gguf.tokenizer import STYLES, TokenType, plan_tokenizer

FILE = Path("x.gguf")
TEXTS = [
    "",
    "Hello world",
    " Hello  world ",
    "\n\n\t x",
    "Où est la gare ? 東京 🚉",
    "I've it's WE'LL 'tis",
    "2024 12345678 3.14 ½ ٣٤",
    "def f(x):\n    return x  # ok\n\n",
    "é",  # decomposed
]


def byte_level_fields(pre: str, **changes: Any) -> dict[str, Any]:
    """A vocabulary of the 256 bytes, all two and three digit numbers, and one special token."""
    digits = [str(digit) for digit in range(10)]
    pairs = [a + b for a in digits for b in digits]
    triples = [pair + c for pair in pairs for c in digits]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *pairs, *triples, "<|im_end|>", "<think>"]
    merges = [f"{pair[0]} {pair[1]}" for pair in pairs] + [f"{triple[:2]} {triple[2]}" for triple in triples]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [TokenType.NORMAL] * (len(tokens) - 2) + [TokenType.CONTROL, TokenType.USER_DEFINED],
        "merges": merges,
        "eos_token_id": len(tokens) - 2,
        "bos_token_id": 0,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (fields | changes).items() if value is not None}


def pieces(pre: str, text: str) -> list[str]:
    """How the pre-tokenizer cuts ASCII text."""
    tokenizer = plan_tokenizer(FILE, byte_level_fields(pre)).tokenizer
    return [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", STYLES)
def test_every_text_has_a_round_trip(pre: str):
    tokenizer = plan_tokenizer(FILE, byte_level_fields(pre)).tokenizer
    for text in TEXTS[:-1] if pre == "qwen2" else TEXTS:  # qwen2 composes accents
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["year", " ", "2", "0", "2", "4", "5"]),
        ("qwen2", ["year", " ", "2", "0", "2", "4", "5"]),
        ("tekken", ["year", " ", "2", "0", "2", "4", "5"]),
        ("llama-bpe", ["year", " ", "202", "45"]),
        ("gpt-2", ["year", " 20245"]),
    ],
)
def test_digits_are_cut_as_the_family_does(pre: str, expected: list[str]):
    assert pieces(pre, "year 20245") == expected


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["I", "'ll", " say", "\n", "\n", "WE", "'", "LL", " (", "x", ")."]),
        ("qwen2", ["I", "'ll", " say", "\n\n", "WE", "'LL", " (", "x", ")."]),
        ("llama-bpe", ["I", "'ll", " say", "\n\n", "WE", "'LL", " (", "x", ")."]),
        ("default", ["I", "'", "ll", " say", "\n", "\n", "WE", "'", "LL", " ", "(", "x", ")."]),
    ],
)
def test_words_and_lines_are_cut_as_the_family_does(pre: str, expected: list[str]):
    assert pieces(pre, "I'll say\n\nWE'LL (x).") == expected


def test_special_and_user_tokens_stay_whole():
    planned = plan_tokenizer(FILE, byte_level_fields("smollm"))
    end, think = planned.tokenizer.token_to_id("<|im_end|>"), planned.tokenizer.token_to_id("<think>")
    ids = planned.tokenizer.encode("<think>a<|im_end|>").ids
    assert (ids[0], ids[-1], len(ids)) == (think, end, 3)
    assert planned.tokenizer.decode(ids) == "<think>a"  # control tokens are not part of the text
    assert planned.token_ids["eos_token_id"] == end


def test_bos_is_added_where_the_file_or_the_family_says_so():
    def starts_with_bos(**changes: Any) -> bool:
        tokenizer = plan_tokenizer(FILE, byte_level_fields(**changes)).tokenizer
        return tokenizer.encode("a").ids[0] == 0 and tokenizer.encode("a", add_special_tokens=False).ids[0] != 0

    assert starts_with_bos(pre="llama-bpe")
    assert not starts_with_bos(pre="llama-bpe", add_bos_token=False)
    assert not starts_with_bos(pre="smollm")
    assert starts_with_bos(pre="smollm", add_bos_token=True)


def test_every_end_of_turn_is_an_eos():
    fields = byte_level_fields("llama-bpe", eos_token_id=5, eot_token_id=6, eom_token_id=7)
    end = fields["tokenizer.ggml.tokens"].index("<|im_end|>")
    assert plan_tokenizer(FILE, fields).token_ids["eos_token_id"] == [5, 6, 7, end]


@pytest.mark.parametrize("text", ["<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "</s>", "<|fim_pad|>", "<EOT>"])
@pytest.mark.parametrize("kind", [TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED])
def test_what_ends_an_answer_in_llama_cpp_ends_it_here(text: str, kind: TokenType):
    """Whatever type the file gives it: there it becomes a control token, so no answer shows it."""
    fields = byte_level_fields("llama-bpe")
    end = fields["tokenizer.ggml.tokens"].index("<|im_end|>")
    fields["tokenizer.ggml.tokens"][7], fields["tokenizer.ggml.token_type"][7] = text, kind
    fields["tokenizer.ggml.merges"] = []
    planned = plan_tokenizer(FILE, fields)
    assert planned.token_ids["eos_token_id"] == [end, 7]
    assert planned.tokenizer.encode(f"a{text}", add_special_tokens=False).ids[-1] == 7
    assert planned.tokenizer.decode([7]) == ""


def test_ids_that_stand_for_no_token_are_ignored():
    """-1, which the format can only store as 4294967295."""
    absent = {f"{name}_token_id": 2**32 - 1 for name in ("padding", "unknown", "eot", "seperator")}
    assert plan_tokenizer(FILE, byte_level_fields("smollm", **absent)) is not None
    planned = plan_tokenizer(FILE, byte_level_fields("llama-bpe", bos_token_id=2**32 - 1, padding_token_id=2**32 - 1))
    assert planned.token_ids.keys() == {"eos_token_id"} and "pad_token" not in planned.settings
    assert planned.settings["add_bos_token"] is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "chameleon"}, "pre-tokenizer 'chameleon'; supported are"),
        ({"pre": None}, "tokenizer.ggml.pre is missing"),
        ({"model": "bert"}, "tokenizer of type 'bert'; supported are gpt2 and llama"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["a zz"]}, "merge 'a' + 'zz' is not made of tokens"),
        ({"eos_token_id": 5000}, "eos_token_id is 5000"),
        ({"token_type": [1, 2]}, "2 token types"),
        ({"tokens": None}, "no tokenizer in its metadata"),
    ],
)
def test_unsupported_tokenizers_are_refused_by_name(changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError) as caught:
        plan_tokenizer(FILE, byte_level_fields(**({"pre": "smollm"} | changes)))
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def trained() -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE model as Llama 2's was trained: byte fallback, split digits, dummy prefix."""
    words = "the capital of France is Paris and the river of Paris is the Seine; 12 or 345 boats".split()
    sentences = [" ".join(words[start:] + words[:start]) for start in range(len(words))] * 4
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_fields(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    ids = range(model.get_piece_size())
    kinds = {0: TokenType.UNKNOWN, 1: TokenType.CONTROL, 2: TokenType.CONTROL}
    fields = {
        "model": "llama",
        "tokens": [model.id_to_piece(index) for index in ids],
        "scores": [model.get_score(index) for index in ids],
        "token_type": [kinds.get(index, TokenType.BYTE if model.is_byte(index) else TokenType.NORMAL) for index in ids],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def test_sentencepiece_ids_are_those_of_sentencepiece(trained: sentencepiece.SentencePieceProcessor):
    tokenizer = plan_tokenizer(FILE, sentencepiece_fields(trained)).tokenizer
    for text in ["the capital of Paris", " the  boats", "Où ? 東京 🚉", "12345", "a\nb\tc", "Seine;Seine"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == trained.encode(text), text
        assert tokenizer.encode(text).ids == [1, *ids]
        assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    file = find_demo_gguf()
    return plan_tokenizer(file, open_gguf(file).metadata).tokenizer


def test_demo_tokenizer_reads_digits_one_by_one(smollm: Tokenizer):
    assert smollm.encode("In 2024").tokens == ["In", "Ġ", "2", "0", "2", "4"]
    assert smollm.encode("x12").tokens == ["x", "1", "2"]


def test_demo_tokenizer_knows_its_text(smollm: Tokenizer):
    assert smollm.encode("<|im_start|>user\nHello<|im_end|>\n").tokens == [
        *("<|im_start|>", "user", "Ċ", "Hello", "<|im_end|>", "Ċ")
    ]
    for text in TEXTS:
        assert smollm.decode(smollm.encode(text).ids) == text
