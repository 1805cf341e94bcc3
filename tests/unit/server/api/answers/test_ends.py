"""Answers that are kept for ratings: what is collected of them, and how much at most."""

import asyncio
from collections.abc import Sequence

from stellarbyte_server.api.answers.choices import Fragment
from stellarbyte_server.api.answers.ends import AnswerEnds
from stellarbyte_server.feedback.store import MAX_ANSWER_BYTES

Kept = list[Sequence[Sequence[Fragment]]]


def noted(*fragments: tuple[int, Fragment], num_answers: int) -> tuple[Kept, AnswerEnds]:
    kept: Kept = []

    async def keep(parts: Sequence[Sequence[Fragment]]) -> None:
        kept.append(parts)

    ends = AnswerEnds(None, keep, num_answers)

    async def note() -> None:
        for number, fragment in fragments:
            assert await ends.note(number, fragment) is fragment

    asyncio.run(note())
    return kept, ends


def test_all_answers_are_kept_once_when_the_last_has_ended() -> None:
    first = Fragment(text="a", logprobs={"content": []}, token_ids=[1])
    end = Fragment(text="b", finish_reason="stop")
    kept, _ = noted((1, first), (0, Fragment(text="c", finish_reason="length")), num_answers=2)
    assert kept == []
    kept, _ = noted((1, first), (0, Fragment(text="c", finish_reason="length")), (1, end), num_answers=2)
    (((only,), (begun, ended)),) = kept
    assert (only.text, begun.text, ended.text, ended.finish_reason) == ("c", "a", "b", "stop")
    assert (begun.logprobs, begun.token_ids, first.token_ids) == (None, None, [1])


def test_an_endless_answer_takes_no_memory_and_is_not_kept() -> None:
    part = Fragment(text="x" * (MAX_ANSWER_BYTES // 4))
    kept, ends = noted(*[(0, part)] * 9, (0, Fragment(finish_reason="stop")), num_answers=1)
    assert kept == [] and sum(map(len, vars(ends)["_parts"].values())) == 0
