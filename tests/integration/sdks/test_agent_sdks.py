"""SDKs of agents on /v1/responses, unchanged: each calls a tool, sends its result back and reads the answer.

The demo model is small, so the first call is forced; how each SDK asks for that is its own.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Literal

import pytest

pytest.importorskip("agents", reason="the SDKs of agents (the extra `agents`) are not installed")

from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from langchain_core.messages import AIMessageChunk, ToolMessage
from langchain_core.tools import tool as langchain_tool
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai import RunContext
from pydantic_ai.messages import ToolCallPart, ToolReturnPart
from pydantic_ai.models.openai import OpenAIResponsesModel as PydanticResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings as PydanticSettings

from tests.support.models.references import MODEL_NAME

WEATHER = "What is the weather in Paris?"
City = Literal["Paris", "London"]


def openai_client(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=120)


# OpenAI's Agents SDK


@pytest.fixture
def cities() -> list[str]:
    """The cities that the tool was called with."""
    return []


@pytest.fixture
def agent(demo_server, cities: list[str]) -> Agent:
    """It must call its tool; after that the SDK itself lets the model choose."""
    set_tracing_disabled(True)

    @function_tool
    def get_weather(city: City) -> str:
        """The weather in a city."""
        cities.append(city)
        return f"It is sunny in {city}."

    return Agent(
        name="weather",
        instructions="Answer briefly.",
        model=OpenAIResponsesModel(MODEL_NAME, openai_client(demo_server.url)),
        model_settings=ModelSettings(tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=60),
        tools=[get_weather],
    )


async def _run(agent: Agent) -> Any:
    return await Runner.run(agent, WEATHER, max_turns=3)


async def _stream(agent: Agent) -> Any:
    result = Runner.run_streamed(agent, WEATHER, max_turns=3)
    kinds = [event.data.type async for event in result.stream_events() if event.type == "raw_response_event"]
    assert "response.function_call_arguments.delta" in kinds and "response.output_text.delta" in kinds
    return result


@pytest.mark.parametrize("run", [_run, _stream])
def test_openais_agents_sdk_runs_a_tool(agent: Agent, cities: list[str], run: Callable[[Agent], Any]) -> None:
    result = asyncio.run(run(agent))
    assert len(cities) == 1 and result.final_output
    assert [item["type"] for item in result.to_input_list()[1:]] == ["function_call", "function_call_output", "message"]


# pydantic-ai


async def _pydantic_run(agent: PydanticAgent) -> Any:
    return await agent.run(WEATHER)


async def _pydantic_stream(agent: PydanticAgent) -> Any:
    async with agent.run_stream(WEATHER) as result:
        assert "".join([text async for text in result.stream_text(delta=True)])
    return result


@pytest.mark.parametrize("run", [_pydantic_run, _pydantic_stream])
def test_pydantic_ai_runs_a_tool(demo_server, cities: list[str], run: Callable[[PydanticAgent], Any]) -> None:
    def settings(_: RunContext[None]) -> PydanticSettings:
        """The first request must call the tool, the second answers."""
        return PydanticSettings(
            tool_choice="none" if cities else "required", parallel_tool_calls=False, temperature=0, max_tokens=60
        )

    model = PydanticResponsesModel(MODEL_NAME, provider=OpenAIProvider(openai_client=openai_client(demo_server.url)))
    agent = PydanticAgent(model, model_settings=settings)

    @agent.tool_plain
    def get_weather(city: City) -> str:
        """The weather in a city."""
        cities.append(city)
        return f"It is sunny in {city}."

    result = asyncio.run(run(agent))
    parts = [part for message in result.all_messages() for part in message.parts]
    (call,) = [part for part in parts if isinstance(part, ToolCallPart)]
    (returned,) = [part for part in parts if isinstance(part, ToolReturnPart)]
    assert cities == [call.args_as_dict()["city"]] and call.tool_call_id == returned.tool_call_id


# LangChain


@langchain_tool
def get_weather(city: City) -> str:
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
        use_responses_api=True,
    )


def _streamed(model: Any, messages: Any) -> AIMessageChunk:
    first, *others = model.stream(messages)
    for chunk in others:
        first += chunk
    return first


@pytest.mark.parametrize("ask", [lambda model, messages: model.invoke(messages), _streamed], ids=["invoke", "stream"])
def test_langchain_calls_a_tool_and_is_told_its_result(langchain: ChatOpenAI, ask: Callable[[Any, Any], Any]) -> None:
    asked = langchain.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    call_message = ask(asked, WEATHER)
    (call,) = call_message.tool_calls
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage) and result.content.startswith("It is sunny in ")
    told = langchain.bind_tools([get_weather], tool_choice="none")
    answer = ask(told, [("user", WEATHER), call_message, result])
    assert answer.text and not answer.tool_calls
    again = ask(told, [("user", WEATHER), call_message, result, answer, ("user", "And in London?")])
    assert again.text
