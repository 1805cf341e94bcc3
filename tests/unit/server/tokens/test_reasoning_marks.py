"""The marks of reasoning are found in the tokenizer and the chat template, never by the model's name."""

import pytest
from tokenizers import AddedToken, Tokenizer

from stellarbyte_server.protocol.request import Channels, Reasoning
from stellarbyte_server.tokens.reasoning_marks import _MARKS, find_marks
from tests.support.engines.harmony_engine import CALL, CONSTRAIN, MARKS, RETURN, harmony_tokenizer
from tests.support.servers.fake_engine import make_tokenizer


def with_tokens(*texts: str, special: bool = False) -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=special) for text in texts])
    return tokenizer


@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_are_marks_by_their_ids(special: bool) -> None:
    found = find_marks(with_tokens("[THINK]", "[/THINK]", special=special), None, 261)
    assert isinstance(found, Reasoning)
    assert (found.start, found.end, found.start_id, found.end_id) == ("[THINK]", "[/THINK]", 259, 260)
    assert (found.start_token_ids, found.end_token_ids) == ((259,), (260,))


def test_texts_of_the_template_are_marks_by_their_bytes() -> None:
    found = find_marks(make_tokenizer(), "{{ '<think>\\n' }}{{ c.split('</think>') }}", 259)
    assert isinstance(found, Reasoning)
    assert (found.start_id, found.end_id, found.end_token_ids) == (None, None, tuple(b"</think>"))


def test_no_marks_are_found_where_one_is_missing_or_has_no_embedding() -> None:
    assert find_marks(make_tokenizer(), None, 259) is None
    assert find_marks(make_tokenizer(), "{{ content.split('</think>')[-1] }}", 259) is None
    assert find_marks(with_tokens("<think>"), "plain", 260) is None
    assert find_marks(with_tokens("<think>", "</think>"), None, 260) is None


def test_the_first_character_of_a_mark_is_in_no_other_place_of_it() -> None:
    for mark in (mark for pair in _MARKS for mark in pair):
        assert mark.isascii() and mark[0] not in mark[1:]


def test_channels_are_found_where_vocabulary_and_template_have_their_marks() -> None:
    found = find_marks(harmony_tokenizer(), "{{ '<|channel|>' }}<think></think>", 264)
    assert isinstance(found, Channels)
    marks = (found.start_id, found.channel_id, found.message_id, found.end_id, *found.final_ids, found.constrain_id)
    assert [harmony_tokenizer().id_to_token(mark) for mark in marks if mark is not None] == list(MARKS[1:])
    assert found.analysis_token_ids == tuple(b"analysis")
    fewer = find_marks(harmony_tokenizer(), "<|channel|>", CALL)  # the last marks have no embedding
    assert isinstance(fewer, Channels)
    assert (fewer.final_ids, fewer.constrain_id) == ((RETURN,), None) and CONSTRAIN > CALL


def test_no_channels_are_found_where_a_mark_is_missing_or_is_text() -> None:
    assert find_marks(harmony_tokenizer(), "<|start|>", 264) is None
    assert find_marks(harmony_tokenizer(), None, 264) is None
    assert find_marks(harmony_tokenizer(), "<|channel|>", 260) is None
    assert find_marks(with_tokens(*MARKS, special=False), "<|channel|>", 300) is None
    thinking = find_marks(with_tokens("<think>", "</think>"), "<|channel|>", 261)
    assert isinstance(thinking, Reasoning)
