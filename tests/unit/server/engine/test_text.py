"""Text of token streams: whole characters, stop strings, and nothing lost, whatever the model produces."""

import functools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stellarbyte_server.engine.text import TextStream
from stellarbyte_server.tokens.detokenizer import Detokenizer, WindowDetokenizer, make_detokenizer

PIECES = ["he", "llo", " wor", "ld", "é", "漢", "字", "👋", "ab", "abc", "\n", "�", "."]


@functools.cache
def byte_level_tokenizer() -> Tokenizer:
    """A token for every byte (its id), some whole pieces, some that start or end inside characters, special tokens."""
    alphabet = byte_alphabet()
    raw = [bytes([value]) for value in range(256)]
    raw += [piece.encode() for piece in PIECES]
    raw += [b"\x98\x80x", b"x\xe2\x82", b"\x82\xac\xe2", "é".encode() + b"\xf0\x9f"]
    vocabulary: dict[str, int] = {}
    for token in raw:
        vocabulary.setdefault("".join(alphabet[value] for value in token), len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|start|>", special=True)])
    tokenizer.add_tokens([AddedToken("two words"), AddedToken("écrit\u3000")])  # not in the byte alphabet
    return tokenizer


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {value: chr(256 + i) for i, value in enumerate(others)}


@functools.cache
def byte_fallback_tokenizer() -> Tokenizer:
    """Llama's kind: words with ▁ for a space, and <0x..> for the bytes of everything else."""
    vocabulary = {f"<0x{value:02X}>": value for value in range(256)}
    for word in ("▁the", "▁cat", "s", "▁", "é", "▁▁"):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def joined(detokenizer: Detokenizer, token_ids: list[int]) -> str:
    return "".join([detokenizer.push(token_id) for token_id in token_ids]) + detokenizer.flush()


def stream(tokenizer: Tokenizer, token_ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """The pieces a client would get, and whether a stop string ended them."""
    text_stream = TextStream(tokenizer, stop)
    pieces = []
    for token_id in token_ids:
        text, stopped = text_stream.push(token_id)
        pieces.append(text)
        if stopped:
            return pieces, True
    return [*pieces, text_stream.flush()], False


def cut_at_first_completed_stop(text: str, stop: tuple[str, ...]) -> str:
    for end in range(1, len(text) + 1):
        met = [s for s in stop if text[:end].endswith(s)]
        if met:
            return text[: end - max(map(len, met))]
    return text


token_lists = st.lists(st.integers(0, byte_level_tokenizer().get_vocab_size() + 1), max_size=80)
byte_heavy_lists = st.lists(st.sampled_from([0x80, 0x9F, 0xC3, 0xE2, 0xF0, 0x41]), max_size=120)
stop_strings = st.lists(
    st.one_of(st.text("abclo \ufffd漢", min_size=1, max_size=4), st.sampled_from(PIECES)), max_size=4
).map(tuple)


@settings(max_examples=50 * settings().max_examples, deadline=None)
@given(token_lists | byte_heavy_lists, stop_strings)
@example([0xF0, 0x9F, 0x91], ())
@example([0x80] * 100, ("\ufffd",))
@example([0xE2, 0x82] * 60, ())
def test_joined_text_is_the_whole_decoded_and_cut_at_the_stop_completed_first(token_ids, stop):
    tokenizer = byte_level_tokenizer()
    whole = tokenizer.decode(token_ids, skip_special_tokens=True)
    pieces, _ = stream(tokenizer, token_ids, stop)
    assert "".join(pieces) == cut_at_first_completed_stop(whole, stop)


@settings(max_examples=4 * settings().max_examples, deadline=None)
@given(token_lists | byte_heavy_lists, st.booleans())
@example([0xF0, 0x9F, 0x91], True)
@example([0x80] * 100, True)
@example([0xE2, 0x82] * 60, True)
def test_windows_give_the_same_text_as_bytes(token_ids, skip_special_tokens):
    """The way for tokenizers of any kind, on one that has a faster way."""
    tokenizer = byte_level_tokenizer()
    whole = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
    assert joined(WindowDetokenizer(tokenizer, skip_special_tokens), token_ids) == whole
    assert joined(make_detokenizer(tokenizer, skip_special_tokens), token_ids) == whole


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_valid_text_never_shows_half_a_character(text):
    pieces, _ = stream(byte_level_tokenizer(), list(text.encode(errors="replace")))
    assert "".join(pieces) == text.encode(errors="replace").decode()
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([256, 257, 258, 259, 260, 261, 0xC3, 0xA9]), max_size=60))
def test_byte_fallback_text_equals_the_whole_when_its_bytes_are_text(token_ids):
    tokenizer = byte_fallback_tokenizer()
    whole = tokenizer.decode(token_ids, skip_special_tokens=True)
    pieces, _ = stream(tokenizer, token_ids)
    if "\ufffd" not in whole:
        assert "".join(pieces) == whole


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 261), max_size=80))
def test_byte_fallback_survives_any_bytes(token_ids):
    stream(byte_fallback_tokenizer(), token_ids)


def test_a_character_decoded_before_a_stray_byte_is_not_taken_back():
    pieces, _ = stream(byte_fallback_tokenizer(), [0xC3, 0xA9, 0x80, 256])
    assert "".join(pieces) == "é\ufffd the"


def test_an_unfinished_last_character_comes_out_as_the_replacement_character():
    pieces, stopped = stream(byte_level_tokenizer(), list(b"a\xf0\x9f"))
    assert (pieces, stopped) == (["a", "", "", "\ufffd"], False)


def test_text_that_may_become_a_stop_string_is_held_back_until_it_cannot():
    text_stream = TextStream(byte_level_tokenizer(), ("hello world",))
    he, llo, wor = (PIECES.index(piece) + 256 for piece in ("he", "llo", " wor"))
    assert text_stream.push(he) == ("", False)
    assert text_stream.push(llo) == ("", False)
    assert text_stream.push(wor) == ("", False)
    assert text_stream.push(he) == ("hello wor", False)
    assert text_stream.flush() == "he"


def test_special_tokens_are_skipped_or_shown():
    tokenizer = byte_level_tokenizer()
    end = tokenizer.token_to_id("<|end|>")
    assert TextStream(tokenizer, ()).push(end) == ("", False)
    assert TextStream(tokenizer, (), skip_special_tokens=False).push(end) == ("<|end|>", False)


def test_ids_beyond_the_tokenizer_add_nothing():
    """Checkpoints pad the vocabulary, so a model can produce ids that no token belongs to."""
    pieces, _ = stream(byte_level_tokenizer(), [256, 10_000, 257])
    assert "".join(pieces) == "hello"


@pytest.mark.parametrize("token_ids", [[0xE2], [0x80, 0xE2]])
def test_a_long_run_of_bytes_that_are_no_text_is_not_held_back_for_ever(token_ids):
    detokenizer = WindowDetokenizer(byte_level_tokenizer(), skip_special_tokens=True)
    assert sum(len(detokenizer.push(token_id)) for token_id in token_ids * 100) > 50
