"""Texts become tokens with labels, and what cannot be read is told in one sentence."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from stellarbyte.analysis.errors import AnalysisError
from stellarbyte.analysis.text import MAX_TEXT_BYTES, Text, load_tokenizer, read_text, tokenize
from stellarbyte.checkpoint.errors import CheckpointError
from tests.support.models.byte_transformer import make_config
from tests.support.models.hugging_face import tiny_tokenizer
from tests.support.training.byte_tokenizer import BOS_ID, NUM_SPECIAL, byte_tokenizer, ids_of, save_byte_tokenizer

CONFIG = make_config(vocab_size=300)


def test_a_file_is_read_and_other_words_are_the_text_itself(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("河 is a river", encoding="utf-8")
    assert read_text(str(tmp_path / "text"), "en") == Text(name="text", content="河 is a river")
    for words in ("a river", "x" * 5000, "a\0b", str(tmp_path)):
        assert read_text(words, "en") == Text(name=None, content=words)
    assert Text(name=None, content="河").num_bytes == 3


@pytest.mark.parametrize("language", ["en", "zh"])
def test_samples_are_texts_in_their_language(language: str) -> None:
    sample = read_text(None, language)
    assert sample.name == f"sample.{language}.txt"
    assert (len(re.findall("[一-鿿]", sample.content)) > 100) == (language == "zh")


def test_texts_that_cannot_be_analysed_get_a_sentence(tmp_path: Path) -> None:
    def told(given: str) -> str:
        with pytest.raises(AnalysisError) as caught:
            read_text(given, "en")
        return str(caught.value)

    empty, long, binary = tmp_path / "empty", tmp_path / "long", tmp_path / "binary"
    empty.write_text(" \n")
    long.write_text("x" * (MAX_TEXT_BYTES + 1))
    binary.write_bytes(b"ab\xff")
    assert told("") == "The text in --text is empty; give at least a word."
    assert told(str(empty)) == f"The text of {empty} is empty; give at least a word."
    assert told(str(long)) == f"{long} has more than 65,536 bytes; give a shorter text."
    assert told("水" * 22_000) == "The text in --text has more than 65,536 bytes; give a shorter text."
    assert told(str(binary)) == f"{binary} is not UTF-8 text: its byte 2 fits no character."
    long.write_text("x" * MAX_TEXT_BYTES)
    assert read_text(str(long), "en").num_bytes == MAX_TEXT_BYTES


def test_tokens_are_the_tokenizers_with_labels_that_can_be_seen() -> None:
    text = Text(name=None, content="a \n\t$河")
    found = tokenize(text, byte_tokenizer().backend_tokenizer, CONFIG)
    assert found.ids == (BOS_ID, *ids_of(text.content)) and found.num_special == 1 and found.num_unknown == 0
    of_river = [f"#{NUM_SPECIAL + byte}" for byte in "河".encode()]
    assert found.labels == ("<|bos|>", "a", "␣", "↵", "⇥", "$", *of_river)


def test_labels_are_short_and_show_what_is_invisible() -> None:
    words = {"￭": 0, "a" * 20: 1, "x\u200b\u202ey": 2, "中文": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="￭"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = tokenize(Text(name=None, content=" ".join([*list(words)[1:], "unseen", "other"])), tokenizer, CONFIG)
    assert found.labels == ("aaaaaaaaaaa…", "xU+200BU+20…", "中文", "￭", "￭")
    assert (found.num_special, found.num_unknown) == (0, 2)


def test_tokens_that_do_not_fit_the_model_are_refused() -> None:
    tokenizer = tiny_tokenizer(300)
    with pytest.raises(AnalysisError, match=r"^The text is 1 token for this model; give one of at least two\.$"):
        tokenize(Text(name=None, content="x"), tokenizer, CONFIG)
    with pytest.raises(
        AnalysisError, match=r"^The text contains the token '.' \(id \d+\), but the model has embeddings"
    ):
        tokenize(Text(name=None, content="xyz"), tokenizer, make_config(vocab_size=20))


def test_a_tokenizer_is_read_is_absent_or_is_broken(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    save_byte_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None and tokenizer.encode("a").ids == [BOS_ID, *ids_of("a")]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: .+\.$"):
        load_tokenizer(tmp_path)
