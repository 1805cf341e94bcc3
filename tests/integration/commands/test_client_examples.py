"""The examples of clients/, run as users run them against the demo model."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.cases import some
from tests.support.clients.node_packages import copy_installed
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


@pytest.mark.parametrize(
    ("name", "package"),
    some([("chat.py", "openai"), ("chat_langchain.py", "langchain_openai"), ("chat_litellm.py", "litellm")], 0, 1),
)
def test_a_python_example_answers_and_speaks_to_the_server_only(demo_server, hosts, name, package) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} (of the extra `agents`) is not installed")
    result = run(demo_server.url, sys.executable, f"clients/examples/{name}", QUESTION)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert set(hosts.read_text().split()) == {"127.0.0.1"}


def test_the_curl_example_answers(demo_server) -> None:
    assert "Paris" in run(demo_server.url, "clients/examples/chat.sh", QUESTION).stdout


@pytest.mark.parametrize(
    "command",
    some(
        [(["chat-ai-sdk.mjs", QUESTION],), (["tour.mjs"],), (["tools-ai-sdk.mjs"],), (["tools-responses.mjs"],)], 0, 1
    ),
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
