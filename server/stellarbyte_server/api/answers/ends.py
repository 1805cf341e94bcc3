"""Finished answers are validated against the parts of their schemas that a grammar cannot enforce, and kept for
--feedback."""

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request

from stellarbyte_server.api.answers.choices import Fragment
from stellarbyte_server.api.answers.tool_calls import joined_calls, joined_function_call
from stellarbyte_server.api.caller import BATCH, owner_id, owner_of
from stellarbyte_server.api.contract.bodies.chat import ChatBody
from stellarbyte_server.api.contract.bodies.completion import CompletionBody
from stellarbyte_server.api.service import Service
from stellarbyte_server.api.structured.answer_check import NOT_CHECKED
from stellarbyte_server.api.submission import record_of
from stellarbyte_server.feedback.store import MAX_ANSWER_BYTES, Answered, Choice, FeedbackStore
from stellarbyte_server.tokens.text_work import TooMuchText

if TYPE_CHECKING:
    from stellarbyte_server.api.answers.answer import AnswerPlan

logger = logging.getLogger("server.feedback")

Calls = Sequence[tuple[str, str]]  # names and arguments
Keep = Callable[[Sequence[Sequence[Fragment]]], Awaitable[None]]  # of the fragments of each answer
_SHOWN = ("role", "content", "tool_calls", "function_call", "reasoning_content")  # of a message


@dataclass(frozen=True)
class KeptRequest:
    """The body of a request whose answers are kept."""

    body: ChatBody | CompletionBody

    @classmethod
    def of(cls, body: ChatBody | CompletionBody, service: Service) -> "KeptRequest | None":
        """None without --feedback, if the client refuses (`store`), or if answers differ from those that are rated."""
        if service.feedback is None or body.store is False or body.num_candidates != body.num_choices:
            return None
        is_part = body.echo if isinstance(body, CompletionBody) else body.continue_final_message
        return None if is_part else cls(body)


def keeper_of(http: Request, service: Service, plan: "AnswerPlan") -> Keep | None:
    """Keeps all answers of a plan; None if they are not kept, as in batches, whose results are files."""
    feedback, kept = service.feedback, plan.kept
    if feedback is None or kept is None or BATCH in http.scope["state"]:
        return None

    async def keep(fragments: Sequence[Sequence[Fragment]]) -> None:
        adapter = record_of(http).adapter
        await asyncio.to_thread(_keep, feedback, owner_id(http), service, plan, kept, adapter, fragments)

    return keep


def _keep(
    feedback: FeedbackStore,
    owner: str,
    service: Service,
    plan: "AnswerPlan",
    kept: KeptRequest,
    adapter: str | None,
    fragments: Sequence[Sequence[Fragment]],
) -> None:
    choices = [_choice(plan.reader(number).whole(number, parts)) for number, parts in enumerate(fragments)]
    answered = Answered(model=plan.model, adapter=adapter, choices=choices, **_request(kept.body, service, plan))
    try:
        feedback.keep(plan.requests[0].request_id, owner, answered)
    except (OSError, sqlite3.Error):
        logger.exception("an answer could not be kept for --feedback")


def _request(body: ChatBody | CompletionBody, service: Service, plan: "AnswerPlan") -> dict[str, Any]:
    if isinstance(body, ChatBody):
        return {
            "messages": [message.model_dump(exclude_none=True) for message in body.messages],
            "tools": [tool.model_dump(exclude_unset=True) for tool in body.tools] if body.tools else None,
        }
    decode = service.tokenizer.decode
    texts = [given if isinstance(given, str) else decode(given, skip_special_tokens=False) for given in body.prompt]
    return {"prompts": [text for text in texts for _ in range(plan.candidates)]}


def _choice(shown: dict[str, Any]) -> Choice:
    message = shown.get("message")
    return Choice(
        message=None if message is None else {name: message[name] for name in _SHOWN if name in message},
        text=shown.get("text"),
        finish_reason=shown["finish_reason"],
    )


class AnswerEnds:
    """Validates the finished answers of one request if their grammar omits a part of their schema, and keeps them if
    they can be rated."""

    def __init__(
        self,
        check: Callable[[str, Calls], Awaitable[str | None]] | None,
        keep: Keep | None = None,
        num_answers: int = 1,
    ) -> None:
        self._check = check
        self._keep = keep
        self._num_running = num_answers
        self._num_characters = 0
        self._parts: dict[int, list[Fragment]] = {}

    @classmethod
    def of(cls, http: Request, service: Service, plan: "AnswerPlan") -> "AnswerEnds":
        check, keep, num_answers = plan.check, keeper_of(http, service, plan), len(plan.requests)
        if check is None:
            return UNCHECKED if keep is None else cls(None, keep, num_answers)
        owner = owner_of(http)

        async def in_thread(text: str, calls: Calls) -> str | None:
            num_characters = len(text) + sum(len(arguments) for _, arguments in calls)
            try:
                return await service.text_work.run(partial(check.violation, text, calls), owner, num_characters)
            except TooMuchText:
                return NOT_CHECKED

        return cls(in_thread, keep, num_answers)

    async def note(self, number: int, fragment: Fragment) -> Fragment:
        """Take the next fragment of a choice. Sets the `schema_violation` of the last one.

        Answers are kept before their end is shown, so that a client can rate them at once.
        """
        if self._check is None and self._keep is None:
            return fragment
        parts = self._parts.setdefault(number, [])
        parts.append(fragment if self._keep is None else self._kept_part(fragment))
        if self._check is not None and fragment.finish_reason in ("stop", "tool_calls", "function_call"):
            called = joined_calls([call for part in parts for call in part.calls])
            functions = [call["function"] for call in called if "function" in call]
            if older := [part.function_call for part in parts if part.function_call is not None]:
                functions.append(joined_function_call(older))
            calls = [(function["name"], function["arguments"]) for function in functions]
            fragment.schema_violation = await self._check("".join(part.text for part in parts), calls)
        if fragment.finish_reason is not None:
            self._num_running -= 1
            if self._keep is not None and self._num_running == 0:
                await self._keep([self._parts[each] for each in sorted(self._parts)])
        return fragment

    def _kept_part(self, fragment: Fragment) -> Fragment:
        """The fragment without its numbers. Answers that are too long to be kept are collected no further."""
        self._num_characters += 1 + len(fragment.text) + len(fragment.reasoning)
        if self._num_characters > MAX_ANSWER_BYTES:
            self._keep = None
            if self._check is None:
                self._parts.clear()
        return replace(
            fragment, pieces=None, logprobs=None, token_ids=None, prompt_logprobs=None, prompt_token_ids=None
        )


UNCHECKED = AnswerEnds(None)
