"""What a request's lists cost grows as their length does: each is so long here that its square would take minutes."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from stellarbyte_server.api.answers.logprobs import ShownToken, TokenAligner
from stellarbyte_server.api.chat.messages import with_tool_prompt
from stellarbyte_server.protocol.messages import TokenLogprob

LIMIT_S = 30.0
MANY = 150_000


def results_of_tools() -> None:
    """One after the other they become one message."""
    messages = [{"role": "tool", "content": "x" * 200}] * MANY
    (shown,) = with_tool_prompt(messages, ())
    assert shown["content"].count("<tool_response>") == MANY


def tokens_without_text() -> None:
    """Special tokens that are skipped, with log-probabilities, wait for text that never comes."""
    aligner = TokenAligner()
    for _ in range(MANY):
        aligner.add([ShownToken(0, TokenLogprob(0, -1.0), 0)])
        assert aligner.show("", None) == []
    assert len(aligner.show("", "length")) == MANY


@pytest.mark.parametrize("work", [results_of_tools, tokens_without_text])
def test_a_long_list_costs_no_minutes(work) -> None:
    executor = ProcessPoolExecutor(1, get_context("spawn"))
    done = executor.submit(work)
    try:
        done.result(LIMIT_S)
    finally:
        for process in list(executor._processes.values()):
            process.kill()
        executor.shutdown(cancel_futures=True)
