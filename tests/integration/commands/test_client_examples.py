"""The examples of clients/, run as users run them against the demo model, and langchain's own way through the API."""

import asyncio
import sys
from pathlib import Path
from typing import Literal

import pydantic
import pytest
from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from tests.support.clients.node_packages import copy_installed
from tests.support.models.references import MODEL_NAME
from tests.support.over_http import run
from tests.support.servers.server_process import ROOT, free_port

QUESTION = "What is the capital of France?"

# Both write down every host that is looked up or connected to.
PYTHON_HOOK = """
import os, sys
def note(event, arguments):
    host = None
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    if host is not None:
        with open(os.environ["HOSTS"], "a") as file:
            print(host, file=file)
sys.addaudithook(note)
"""
NODE_HOOK = """
import fs from "node:fs";
import net from "node:net";
const { connect } = net.Socket.prototype;
net.Socket.prototype.connect = function (...args) {
  fs.appendFileSync(process.env.HOSTS, `${[args].flat(2)[0].host}\\n`);
  return connect.apply(this, args);
};
"""


@pytest.fixture
def hosts(tmp_path, monkeypatch) -> Path:
    """Where a process that is started during the test notes the hosts it connects to."""
    (tmp_path / "sitecustomize.py").write_text(PYTHON_HOOK)
    (tmp_path / "hook.mjs").write_text(NODE_HOOK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("NODE_OPTIONS", f"--import={tmp_path / 'hook.mjs'}")
    monkeypatch.setenv("HOSTS", str(tmp_path / "hosts"))
    return tmp_path / "hosts"


@pytest.fixture(scope="session")
def node_examples(tmp_path_factory) -> Path:
    """A copy of clients/examples/node with its packages installed."""
    target = tmp_path_factory.mktemp("clients") / "node"
    return copy_installed(ROOT / "clients/examples/node", target, "install", "--no-package-lock")


@pytest.mark.parametrize("name", ["chat.py", "chat_langchain.py", "chat_litellm.py"])
def test_a_python_example_answers_and_speaks_to_the_server_only(demo_server, hosts, name) -> None:
    result = run(demo_server.url, sys.executable, f"clients/examples/{name}", QUESTION)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert set(hosts.read_text().split()) == {"127.0.0.1"}


def test_the_curl_example_answers(demo_server) -> None:
    assert "Paris" in run(demo_server.url, "clients/examples/chat.sh", QUESTION).stdout


@pytest.mark.parametrize(
    "command",
    [["chat-ai-sdk.mjs", QUESTION], ["tour.mjs"], ["tools-ai-sdk.mjs"], ["tools-responses.mjs"]],
    ids=["chat-ai-sdk", "tour", "tools-ai-sdk", "tools-responses"],
)
def test_a_node_example_answers_and_speaks_to_the_server_only(node_examples, demo_server, hosts, command) -> None:
    result = run(demo_server.url, "node", str(node_examples / command[0]), *command[1:])
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert set(hosts.read_text().split()) == {"127.0.0.1"}


@pytest.mark.parametrize("name", ["chat-ai-sdk.mjs", "tour.mjs", "tools-ai-sdk.mjs", "tools-responses.mjs"])
def test_a_node_example_fails_where_the_server_does(node_examples, fake_server, name) -> None:
    """The others meet an engine that repeats its prompt, so follows no schema; the chat meets no server."""
    url = fake_server.url if name != "chat-ai-sdk.mjs" else f"http://127.0.0.1:{free_port()}"
    assert run(url, "node", str(node_examples / name)).returncode != 0


# The loop of the official openai package for Node that calls tools: whole, then streamed with what it has sent back
RUN_TOOLS = """
import assert from "node:assert/strict";
import OpenAI from "openai";
const client = new OpenAI({ baseURL: `${process.env.STELLARBYTE_URL}/v1`, apiKey: "unused" });
const model = (await client.models.list()).data[0].id;
const cities = [];
const get_weather = {
  name: "get_weather",
  description: "The weather in a city.",
  parse: JSON.parse,
  parameters: { type: "object", properties: { city: { enum: ["Paris", "London"] } }, required: ["city"] },
  function: ({ city }) => `It is sunny in ${cities[cities.push(city) - 1]}.`,
};
const messages = [{ role: "user", content: "What is the weather in Paris?" }];
for (const stream of [false, true]) {
  const runner = client.chat.completions.runTools({
    model, messages: [...messages], stream, temperature: 0, max_tokens: 60,
    tools: [{ type: "function", function: get_weather }],
    tool_choice: { type: "function", function: { name: "get_weather" } },
  });
  await runner.done();
  assert.equal(runner.messages.at(-1).role, "tool");
  messages.push(...runner.messages.slice(messages.length), { role: "user", content: "And in London?" });
}
assert.equal(cities.length, 2);
const told = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 8 });
assert.ok(told.choices[0].message.content);
"""


def test_openais_loop_over_tools_for_node_calls_one_in_each_turn(node_examples, demo_server) -> None:
    (node_examples / "run-tools.mjs").write_text(RUN_TOOLS)
    result = run(demo_server.url, "node", str(node_examples / "run-tools.mjs"))
    assert result.returncode == 0, result.stderr


# langchain


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
