"""The official anthropic client, strict about what it gets, and short ways to ask with it."""

from typing import Any

import anthropic
from anthropic.types import Message

from tests.support.models.references import MODEL_NAME

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def strict_client(url: str, api_key: str = "unused") -> anthropic.Anthropic:
    """Raises when an answer or an event is not of the type that the client promises."""
    return anthropic.Anthropic(
        base_url=url, api_key=api_key, timeout=60, max_retries=0, _strict_response_validation=True
    )


def fields(messages: Any = QUESTION, **more: Any) -> dict[str, Any]:
    """Of a call of the client, whose methods have no sampling parameters any more."""
    more["extra_body"] = {"temperature": 0} | more.get("extra_body", {})
    return {"model": MODEL_NAME, "messages": messages, "max_tokens": 24} | more


def ask(client: anthropic.Anthropic, messages: Any = QUESTION, **more: Any) -> Message:
    answer: Message = client.messages.create(**fields(messages, **more))
    return answer


def streamed(client: anthropic.Anthropic, messages: Any = QUESTION, **more: Any) -> tuple[list[Any], Message]:
    """Every event that the client's helper gives, and the message that it makes of them."""
    asked = fields(messages, **more)
    with client.messages.stream(**asked) as stream:
        events = list(stream)
        return events, stream.get_final_message()


def told(message: Message) -> dict[str, Any]:
    """What both a whole message and one that was streamed say."""
    content = [block.model_dump(exclude_none=True, exclude={"id"}) for block in message.content]
    return {
        "content": content,
        "stop": (message.stop_reason, message.stop_sequence),
        "output_tokens": message.usage.output_tokens,
    }


def num_prompt_tokens(message: Message) -> int:
    usage = message.usage
    return usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
