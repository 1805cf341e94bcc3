// Streams are read whatever pieces they come in, and what goes wrong has a class of its own.

import assert from "node:assert/strict";
import { test } from "node:test";

import { ApiError, Server, ServerGone, StreamBroken, failureOf } from "../stellarbyte_web/api.js";
import { readEvents } from "../stellarbyte_web/sse.js";

const bytes = (text) => new TextEncoder().encode(text);

async function* pieces(content, size) {
  for (let i = 0; i < content.length; i += size) yield content.slice(i, i + size);
}

async function all(iterable) {
  const found = [];
  for await (const item of iterable) found.push(item);
  return found;
}

const EVENTS = [
  ["data: a\n\ndata: b\n\n", ["a", "b"]],
  ["data: a\r\n\r\ndata:b\r\rdata:  c\n\n", ["a", "b", " c"]],
  [": ping\n\n:\n\ndata: 你好 😀\n\n: ping\n\n", ["你好 😀"]],
  ["\ufeffevent: x\nid: 1\nretry: 5\ndata: one\ndata: two\ndata\n\n\n\n", ["one\ntwo\n"]],
  ['data: {"a": 1}\n\ndata: cut off\n', ['{"a": 1}']],
  ["data: one\r\ndata: two\r\n\r\n", ["one\ntwo"]],
  ["dat: no\ndatax: no\n\n", []],
];

test("events are the same in pieces of any size", async () => {
  for (const [text, wanted] of EVENTS) {
    const content = bytes(text);
    for (let size = 1; size <= content.length; size += 1) {
      assert.deepEqual(await all(readEvents(pieces(content, size))), wanted, JSON.stringify([text, size]));
    }
  }
});

/** A server whose answers are made here; requests are noted. */
function fakeServer(answer, { key = "" } = {}) {
  const requests = [];
  const fetcher = async (url, init) => {
    requests.push({ url: String(url), ...init });
    return typeof answer === "function" ? answer(init) : answer;
  };
  return { server: new Server("http://h.example/base/", () => key, fetcher), requests };
}

const stream = (text) => new Response(text, { headers: { "Content-Type": "text/event-stream" } });
const chunk = (content) => ({ choices: [{ delta: { content }, logprobs: null, finish_reason: null }] });
const event = (object) => `data: ${JSON.stringify(object)}\n\n`;
const chat = (server, signal = new AbortController().signal) => server.streamChat({ model: "m", messages: [] }, signal);

test("a chat is streamed to its end, with the key, below the path that the page lies at", async () => {
  const { server, requests } = fakeServer(
    stream(`${event(chunk("a"))}: ping\n\n${event(chunk("b"))}data: [DONE]\n\n`),
    { key: "secret" },
  );
  assert.deepEqual(await all(chat(server)), [chunk("a"), chunk("b")]);
  const [request] = requests;
  assert.equal(request.url, "http://h.example/base/v1/chat/completions");
  assert.equal(request.method, "POST");
  assert.equal(request.headers["Authorization"], "Bearer secret");
  assert.equal(request.credentials, "omit");
  assert.deepEqual(JSON.parse(request.body), { model: "m", messages: [], stream: true });
});

test("without a key there is no header for it", async () => {
  const { server, requests } = fakeServer(() => Response.json({ data: [] }));
  assert.deepEqual(await server.models(), []);
  assert.deepEqual(requests[0].headers, {});
});

test("a stream that ends without [DONE], or says nothing that can be read, is broken", async () => {
  for (const text of ["", event(chunk("a")), `${event(chunk("a"))}data: [DONE]`, "data: {\n\ndata: [DONE]\n\n"]) {
    await assert.rejects(all(chat(fakeServer(stream(text)).server)), StreamBroken, text);
  }
  const cut = new Response(
    new ReadableStream({
      start(controller) {
        controller.enqueue(bytes(event(chunk("a"))));
      },
      pull(controller) {
        controller.error(new TypeError("network error"));
      },
    }),
  );
  await assert.rejects(all(chat(fakeServer(cut).server)), StreamBroken);
});

test("an error within a stream is the server's error", async () => {
  const error = { message: "The engine failed.", type: "server_error", param: null, code: "engine_unavailable" };
  const { server } = fakeServer(stream(event(chunk("a")) + event({ error })));
  await assert.rejects(all(chat(server)), (found) => {
    assert.ok(found instanceof ApiError);
    assert.deepEqual(failureOf(found), {
      kind: "refused",
      status: null,
      message: "The engine failed.",
      retryAfterS: null,
    });
    return true;
  });
});

test("an error before the stream has its status, message and time to wait", async () => {
  const error = { message: "Too many.", type: "rate_limit_error", param: null, code: "queue_full" };
  const { server } = fakeServer(() => Response.json({ error }, { status: 429, headers: { "Retry-After": "7" } }));
  await assert.rejects(all(chat(server)), (found) => {
    assert.deepEqual(failureOf(found), { kind: "refused", status: 429, message: "Too many.", retryAfterS: 7 });
    return true;
  });
});

test("an error that is not the server's own is still told", async () => {
  const { server } = fakeServer(() => new Response("<html>Bad gateway</html>", { status: 502 }));
  await assert.rejects(server.models(), (found) => {
    assert.deepEqual(failureOf(found), { kind: "refused", status: 502, message: "HTTP 502", retryAfterS: null });
    return true;
  });
});

test("nothing that answers is a server that is gone", async () => {
  const { server } = fakeServer(() => Promise.reject(new TypeError("Failed to fetch")));
  for (const request of [server.models(), server.adapters(), server.metrics(), server.ready(), all(chat(server))]) {
    await assert.rejects(request, ServerGone);
  }
  await assert.rejects(fakeServer(() => new Response("no JSON")).server.models(), ServerGone);
});

test("stopping is no failure of the server, and closes the connection", async () => {
  const abort = new AbortController();
  let isClosed = false;
  const endless = new Response(
    new ReadableStream({
      pull: (controller) => controller.enqueue(bytes(event(chunk("a")))),
      cancel: () => {
        isClosed = true;
      },
    }),
  );
  await assert.rejects(
    async () => {
      for await (const found of chat(fakeServer(endless).server, abort.signal)) {
        assert.deepEqual(found, chunk("a"));
        abort.abort();
        abort.signal.throwIfAborted();
      }
    },
    { name: "AbortError" },
  );
  assert.ok(isClosed);
});

test("mistakes of our own are not taken for failures of the server", () => {
  assert.throws(() => failureOf(new TypeError("x is undefined")), TypeError);
});

test("what is only read has a time limit, so that a server that hangs is told", async () => {
  const signals = [];
  const fetcher = async (_, { signal }) => {
    signals.push(signal instanceof AbortSignal);
    return new Response("{}");
  };
  const server = new Server("http://h/", () => "", fetcher);
  await server.metrics();
  await server.adapters();
  await server.unloadAdapter("mine");
  assert.deepEqual(signals, [true, true, false]);
});
