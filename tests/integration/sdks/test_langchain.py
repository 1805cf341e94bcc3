"""langchain's ChatOpenAI on /v1/chat/completions; test_agent_sdks.py has it on /v1/responses."""

import asyncio
from typing import Literal

import pydantic
import pytest

pytest.importorskip("langchain_openai", reason="the SDKs of agents (the extra `agents`) are not installed")

from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from tests.support.models.references import MODEL_NAME

QUESTION = "What is the capital of France?"


class Capital(pydantic.BaseModel):
    """The capital of a country."""

    city: Literal["Paris", "London"]


@tool
def get_weather(city: Literal["Paris", "London"]) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


@pytest.fixture(scope="module")
def langchain(demo_server) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{demo_server.url}/v1",
        api_key="unused",
        model=MODEL_NAME,
        temperature=0,
        max_tokens=60,
        max_retries=0,
        stream_usage=True,
    )


def test_langchain_invokes_and_streams_the_same_answer(langchain) -> None:
    whole = langchain.invoke(QUESTION)
    assert "Paris" in whole.text
    chunks = list(langchain.stream(QUESTION))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [usage["output_tokens"] for usage in usages] == [whole.usage_metadata["output_tokens"]]


def test_langchain_calls_a_tool_and_is_told_its_result(langchain) -> None:
    asked = langchain.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    call_message = asked.invoke("What is the weather in Paris?")
    (call,) = call_message.tool_calls
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage) and result.content.startswith("It is sunny in ")
    answer = langchain.bind_tools([get_weather], tool_choice="none").invoke(
        [("user", "What is the weather in Paris?"), call_message, result]
    )
    assert answer.text and not answer.tool_calls


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_reads_structured_output(langchain, method) -> None:
    assert isinstance(langchain.with_structured_output(Capital, method=method).invoke(QUESTION), Capital)


def test_langchain_answers_asynchronously(langchain) -> None:
    async def ask() -> list[str]:
        async def streamed() -> str:
            return "".join([chunk.text async for chunk in langchain.astream(QUESTION)])

        whole, text = await asyncio.gather(langchain.ainvoke(QUESTION), streamed())
        return [whole.text, text]

    whole, streamed = asyncio.run(ask())
    assert "Paris" in whole
    assert whole == streamed
