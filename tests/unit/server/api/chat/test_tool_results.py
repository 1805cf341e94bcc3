"""Results of tools belong to calls."""

import pytest

from stellarbyte_server.api.chat.tool_results import with_call_after_call, with_results_in_order
from stellarbyte_server.api.contract.errors import ApiError

USER = {"role": "user", "content": "hi"}


def called(*ids):
    return {"role": "assistant", "content": "x", "tool_calls": [{"id": each, "function": {}} for each in ids]}


def result(call_id, content=""):
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def ordered(*messages, may_end_open=False):
    return with_results_in_order(messages, may_end_open=may_end_open)


def test_results_stand_in_the_order_of_their_calls():
    messages = [USER, called("a", "b", "c"), result("c"), result("a"), result("b"), USER, called("a"), result("a")]
    assert ordered(*messages) == [*messages[:2], messages[3], messages[4], messages[2], *messages[5:]]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([result("a")], "messages[0]"),
        ([USER, {"role": "assistant", "content": "x"}, result("a")], "messages[2]"),
        ([called("a"), result("a"), USER, result("a")], "messages[3]"),
        ([USER, called("a"), result("b")], "messages[2].tool_call_id"),
        ([called("a", "b"), result("a"), result("b"), result("a")], "messages[3].tool_call_id"),
        ([USER, called("a", "b"), result("a"), USER], "messages[1]"),
        ([called("a"), USER, result("a")], "messages[0]"),
        ([called("a"), called("b"), result("b")], "messages[0]"),
        ([USER, called("a", "a"), result("a")], "messages[1].tool_calls[1].id"),
        ([USER, called("a")], "messages[1]"),
        ([USER, called("a", "b"), result("b")], "messages[1]"),
    ],
)
def test_results_and_calls_that_do_not_fit_are_refused_by_their_place(messages, param):
    with pytest.raises(ApiError) as caught:
        ordered(*messages)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert len(str(caught.value)) < 300


def test_only_the_last_calls_of_a_chat_that_goes_on_may_have_no_results():
    messages = [USER, called("a", "b"), result("b")]
    assert ordered(*messages, may_end_open=True) == messages
    with pytest.raises(ApiError):
        ordered(*messages, USER, may_end_open=True)


def test_calls_come_one_after_the_other_for_a_template_that_knows_one_at_a_time():
    messages = [USER, called("a", "b"), result("a"), result("b"), called("c")]
    split = with_call_after_call(messages)
    assert [message["role"] for message in split] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [[call["id"] for call in message.get("tool_calls", ())] for message in split[1::2]] == [["a"], ["b"], ["c"]]
    assert [message["content"] for message in split[1::2]] == ["x", "", "x"]
    assert with_call_after_call([called("a", "b")]) == [called("a"), called("b") | {"content": ""}]
