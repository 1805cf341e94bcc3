"""Requests an answer through OpenAI's client; turns errors into one sentence."""

import time
from collections.abc import Callable
from typing import Any

import openai
from openai.types import CompletionUsage

from stellarbyte_client.address import GENERATION_TIMEOUT_S, Address
from stellarbyte_client.errors import server_error, timed_out, unreachable
from stellarbyte_client.terminal.connection import Connection, server_problem
from stellarbyte_client.terminal.conversation import Answer, Ending, Usage


class Asker:
    """A connection for answers in succession, on one event loop."""

    def __init__(self, connection: Connection) -> None:
        self._url = connection.base_url
        address = Address.of(connection.base_url, connection.api_key, None, GENERATION_TIMEOUT_S)
        self._client = openai.AsyncOpenAI(**address.openai_options())

    async def ask(self, request: dict[str, Any], answer: Answer, on_text: Callable[[str], None] | None = None) -> None:
        """Stream into `answer`; `on_text` gets each piece. A failure sets `answer.problem`.

        Cancellation aborts the request.
        """
        try:
            await self._stream(request, answer, on_text)
        except openai.APIStatusError as error:
            refused = server_error(error.response)
            answer.problem = server_problem(refused.status, refused.message, refused.retry_after_s)
        except openai.APIConnectionError as error:  # includes timeouts
            answer.problem = self._connection_problem(error, answer)
        except openai.APIError as error:  # the error event of a stream
            answer.problem = f"The answer broke off: {error.message}"

    async def _stream(self, request: dict[str, Any], answer: Answer, on_text: Callable[[str], None] | None) -> None:
        started_s = time.perf_counter()
        finish_reason = None
        fields = dict(request)
        stream = await self._client.chat.completions.create(
            model=fields.pop("model"),
            messages=fields.pop("messages"),
            stream=True,
            stream_options={"include_usage": True},
            extra_body=fields,
        )
        async with stream:
            async for chunk in stream:
                answer.id = chunk.id
                if chunk.usage is not None:
                    answer.usage = _usage(chunk.usage)
                for choice in chunk.choices:
                    finish_reason = choice.finish_reason or finish_reason
                    reasoning = (choice.delta.model_extra or {}).get("reasoning_content") or ""
                    text = choice.delta.content or ""
                    if text or reasoning:
                        elapsed_s = time.perf_counter() - started_s
                        answer.ttft_s = elapsed_s if answer.ttft_s is None else answer.ttft_s
                        answer.streaming_s = elapsed_s - answer.ttft_s
                        answer.reasoning += reasoning
                        answer.text += text
                        if on_text is not None:
                            on_text(text)
        if finish_reason is None:
            answer.problem = "The answer broke off: the server closed the stream early."
        else:
            answer.ending = Ending.LENGTH if finish_reason == "length" else Ending.COMPLETE

    def _connection_problem(self, error: openai.APIConnectionError, answer: Answer) -> str:
        if answer.text:
            return f"The connection to {self._url} was lost during the answer."
        if isinstance(error, openai.APITimeoutError):
            return str(timed_out(self._url))
        return str(unreachable(self._url, error.__cause__ or error))


def _usage(usage: CompletionUsage) -> Usage:
    details = usage.prompt_tokens_details
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens or 0) if details is not None else 0,
        completion_tokens=usage.completion_tokens,
        evicted_tokens=(usage.model_extra or {}).get("evicted_tokens", 0),
    )
