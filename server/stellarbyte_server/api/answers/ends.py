"""Finished answers are validated against the parts of their schemas that a grammar cannot enforce."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from fastapi import Request

from stellarbyte_server.api.answers.choices import Fragment
from stellarbyte_server.api.answers.tool_calls import joined_calls, joined_function_call
from stellarbyte_server.api.caller import owner_of
from stellarbyte_server.api.service import Service
from stellarbyte_server.api.structured.answer_check import NOT_CHECKED, AnswerCheck
from stellarbyte_server.tokens.text_work import TooMuchText

Calls = Sequence[tuple[str, str]]  # names and arguments


class AnswerEnds:
    """Validates the finished answers of one request if their grammar omits a part of their schema."""

    def __init__(self, check: Callable[[str, Calls], Awaitable[str | None]] | None) -> None:
        self._check = check
        self._parts: dict[int, list[Fragment]] = {}

    @classmethod
    def of(cls, http: Request, service: Service, check: AnswerCheck | None) -> "AnswerEnds":
        if check is None:
            return UNCHECKED
        owner = owner_of(http)

        async def in_thread(text: str, calls: Calls) -> str | None:
            num_characters = len(text) + sum(len(arguments) for _, arguments in calls)
            try:
                return await service.text_work.run(partial(check.violation, text, calls), owner, num_characters)
            except TooMuchText:
                return NOT_CHECKED

        return cls(in_thread)

    async def note(self, number: int, fragment: Fragment) -> Fragment:
        """Take the next fragment of a choice. Sets the `schema_violation` of the last one."""
        if self._check is None:
            return fragment
        parts = self._parts.setdefault(number, [])
        parts.append(fragment)
        if fragment.finish_reason in ("stop", "tool_calls", "function_call"):
            called = joined_calls([call for part in parts for call in part.calls])
            functions = [call["function"] for call in called if "function" in call]
            if older := [part.function_call for part in parts if part.function_call is not None]:
                functions.append(joined_function_call(older))
            calls = [(function["name"], function["arguments"]) for function in functions]
            fragment.schema_violation = await self._check("".join(part.text for part in parts), calls)
        return fragment


UNCHECKED = AnswerEnds(None)
