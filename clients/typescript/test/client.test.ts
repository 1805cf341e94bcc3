// The client against a real server, whose address and keys come as variables, and against a stand-in for what no
// server of ours says. tests/clients/test_typescript_client.py starts the server and runs this.

import assert from "node:assert/strict";
import { once } from "node:events";
import http from "node:http";
import type { AddressInfo } from "node:net";
import { test, type TestContext } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { ConnectionFailed, ServerError, StellarByte, StellarByteError, UnexpectedAnswer } from "@stellarbyte/client";

const { STELLARBYTE_URL: url = "", USER_KEY: apiKey = "", ADMIN_KEY: adminApiKey = "" } = process.env;
const client = new StellarByte({ apiKey, adminApiKey }); // finds its address in STELLARBYTE_URL
const messages = [{ role: "user", content: "the capital of France" }];

/** What the server itself answers with. */
async function raw(path: string): Promise<any> {
  return (await fetch(url + path, { headers: { Authorization: `Bearer ${adminApiKey}` } })).json();
}

interface Stub {
  readonly url: string;
  readonly asked: { method: string; url: string; headers: http.IncomingHttpHeaders; body: string }[];
}

/** A server that gives `answers` one after the other; the last stays. Null: it never answers. */
async function stub(
  context: TestContext,
  ...answers: ({ status?: number; headers?: Record<string, string>; body: string } | null)[]
): Promise<Stub> {
  const asked: Stub["asked"] = [];
  const server = http.createServer(async (request, response) => {
    let body = "";
    for await (const part of request) body += part;
    const answer = answers[Math.min(asked.length, answers.length - 1)];
    asked.push({ method: request.method ?? "", url: request.url ?? "", headers: request.headers, body });
    if (answer) response.writeHead(answer.status ?? 200, answer.headers).end(answer.body);
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  context.after(() => {
    server.closeAllConnections();
    server.close();
  });
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, asked };
}

async function failure<T extends StellarByteError>(
  call: Promise<unknown>,
  kind: new (...args: any[]) => T,
): Promise<T> {
  const error = await call.then(
    () => null,
    (reason: unknown) => reason,
  );
  assert.ok(error instanceof kind, `${error} is no ${kind.name}`);
  assert.ok(error instanceof StellarByteError && error.name === kind.name);
  return error;
}

test("adapters are loaded, replaced and unloaded", async () => {
  const loaded = await client.adapters.load("mine", "pirate");
  assert.equal(loaded.rank, 4);
  assert.ok(loaded.matched.includes("model.layers.0.self_attn.q_proj"));
  const mine = (await client.adapters.list()).find((adapter) => adapter.id === "mine");
  assert.deepEqual([mine?.state, mine?.root, mine?.content_hash], ["ready", "pirate", loaded.content_hash]);
  const refused = await failure(client.adapters.load("mine", "json"), ServerError);
  assert.deepEqual([refused.status, refused.type], [400, "invalid_request_error"]);
  const replaced = await client.adapters.load("mine", "json", { replace: true });
  assert.notEqual(replaced.content_hash, loaded.content_hash);
  const unloaded = await client.adapters.unload("mine");
  assert.ok(unloaded.lora_name === "mine" && unloaded.freed_bytes >= loaded.bytes);
  assert.deepEqual(
    (await client.adapters.list()).map((adapter) => adapter.id),
    ["json", "pirate"],
  );
});

test("an adapter has versions, goes back and is split", async () => {
  const first = await client.adapters.load("mine", "pirate");
  const second = await client.adapters.load("mine", "json", { replace: true });
  assert.deepEqual([first.version, second.version], [1, 2]);
  const history = await client.adapters.versions("mine");
  assert.deepEqual(
    history.data.map((each) => [each.content_hash, each.source]),
    [
      [first.content_hash, "pirate"],
      [second.content_hash, "json"],
    ],
  );
  assert.deepEqual(history.data[1]?.probe, second.probe);
  const split = await client.adapters.split("mine", { 1: 0.25, [second.content_hash]: 0.75 });
  assert.deepEqual(split.shares, { [first.content_hash]: 0.25, [second.content_hash]: 0.75 });
  assert.deepEqual((await client.adapters.split("mine", {})).shares, {});
  assert.equal((await client.adapters.rollback("mine")).current, 1);
  assert.equal((await client.adapters.rollback("mine", 2)).current, 2);
  assert.equal((await client.adapters.load("mine", "pirate", { replace: true, probe: false })).probe, null);
  await client.adapters.unload("mine");
  assert.equal((await failure(client.adapters.versions("mine"), ServerError)).status, 404);
});

test("watching shows each change", async () => {
  const lists = client.adapters.watch({ intervalMs: 5 });
  const atFirst = await lists.next();
  assert.deepEqual(atFirst.value, await client.adapters.list());
  await client.adapters.load("watched", "pirate");
  assert.deepEqual(
    (await lists.next()).value?.map((adapter) => adapter.id),
    ["json", "pirate", "watched"],
  );
  await client.adapters.unload("watched");
  assert.deepEqual(await lists.next(), atFirst);
});

test("watching ends as soon as it is told to", { timeout: 10_000 }, async () => {
  const stop = new AbortController();
  const lists = client.adapters.watch({ intervalMs: 3_600_000, signal: stop.signal });
  await lists.next();
  const next = lists.next();
  stop.abort();
  assert.deepEqual(await next, { done: true, value: undefined });
});

test("watching ends as soon as it is told to while the server is asked", { timeout: 10_000 }, async (context) => {
  const { url, asked } = await stub(context, null);
  const stop = new AbortController();
  const next = new StellarByte({ baseUrl: url }).adapters.watch({ signal: stop.signal }).next();
  while (asked.length === 0) await sleep(1);
  stop.abort();
  assert.deepEqual(await next, { done: true, value: undefined });
});

test("watching shows nothing where nothing changes", async (context) => {
  const body = (id: string): string => JSON.stringify({ object: "list", data: [{ id }] });
  const { url, asked } = await stub(context, { body: body("a") }, { body: body("a") }, { body: body("b") });
  const lists = new StellarByte({ baseUrl: url }).adapters.watch({ intervalMs: 1 });
  assert.deepEqual((await lists.next()).value, [{ id: "a" }]);
  assert.deepEqual((await lists.next()).value, [{ id: "b" }]);
  assert.equal(asked.length, 3);
});

test("models and adapters are those of the server", async () => {
  assert.deepEqual(await client.models(), (await raw("/v1/models")).data);
  assert.deepEqual(await client.adapters.list(), (await raw("/v1/adapters")).data);
});

test("tokens of a text and back, and of a chat", async () => {
  const prompt = "the capital of France — Paris";
  const tokenized = await client.tokenize({ prompt, model: "pirate", return_token_strs: true });
  assert.equal(tokenized.count, tokenized.token_strs?.length);
  assert.equal(tokenized.max_model_len, 512);
  assert.equal(await client.detokenize(tokenized.tokens), prompt);
  const asked = await client.detokenize((await client.tokenize({ messages })).tokens);
  assert.ok(asked.endsWith("<|im_end|>\n<|im_start|>assistant\n"));
  const unasked = await client.tokenize({ messages, add_generation_prompt: false });
  assert.ok((await client.detokenize(unasked.tokens)).endsWith("<|im_end|>\n"));
});

test("an answer is rated, with a better one", async () => {
  const response = await fetch(`${url}/v1/chat/completions`, {
    method: "POST",
    headers: { Authorization: `Bearer ${apiKey}`, "Content-Type": "application/json" },
    body: JSON.stringify({ model: "tiny", messages, max_tokens: 2, n: 2 }),
  });
  const { id, choices } = (await response.json()) as any;
  const rating = await client.rate(id, "bad", { answer: "Paris", comment: "capital", index: 1 });
  const stored = (await raw("/v1/feedback")).data.find((each: { id: string }) => each.id === rating);
  assert.deepEqual([stored.rating, stored.answer, stored.comment], ["bad", "Paris", "capital"]);
  assert.equal(stored.choice.message.content, choices[1].message.content);
  const refused = await failure(client.rate(id, "good", { index: 2 }), ServerError);
  assert.deepEqual([refused.status, refused.param], [400, "index"]);
});

test("metrics are those of the server", async () => {
  const samples = await client.metrics();
  assert.deepEqual(
    samples.find((sample) => sample.name === "vllm:num_requests_running"),
    { name: "vllm:num_requests_running", labels: { model_name: "tiny" }, value: 0 },
  );
  const buckets = samples.filter((sample) => sample.name === "vllm:e2e_request_latency_seconds_bucket");
  assert.ok(buckets.length > 1 && buckets.at(-1)?.labels["le"] === "+Inf");
});

test("metrics in every form that the format allows", async (context) => {
  const lines = ["# HELP a b", "", "a 1", 'b{x="\\"}\\\\\\n, y=",z=""} +Inf 1700000000', "c{} NaN", 'd{l="1",} -2.5e3'];
  const { url } = await stub(context, { body: lines.join("\n") });
  assert.deepEqual(await new StellarByte({ baseUrl: url }).metrics(), [
    { name: "a", labels: {}, value: 1 },
    { name: "b", labels: { x: '"}\\\n, y=', z: "" }, value: Infinity },
    { name: "c", labels: {}, value: NaN },
    { name: "d", labels: { l: "1" }, value: -2500 },
  ]);
  for (const body of ["<h1>It works!</h1>", "a", "a one", "a{x=1} 2", 'a{x="1"y="2"} 3']) {
    const wrong = new StellarByte({ baseUrl: (await stub(context, { body })).url });
    assert.match((await failure(wrong.metrics(), UnexpectedAnswer)).message, /\/metrics is not that of a StellarByte/);
  }
});

test("a server that works is healthy and ready", async () => {
  assert.deepEqual(await client.health(), { isHealthy: true, reason: null });
  assert.equal(await client.isReady(), true);
  assert.equal(await client.version(), (await raw("/version")).version);
});

test("a server that does not work says why", async (context) => {
  const error = { message: "The engine has ended.", type: "server_error", param: null, code: "engine_unavailable" };
  const answer = { status: 503, headers: { "Retry-After": "5" }, body: JSON.stringify({ error }) };
  const failing = new StellarByte({ baseUrl: (await stub(context, answer)).url });
  assert.deepEqual(await failing.health(), { isHealthy: false, reason: error.message });
  assert.equal(await failing.isReady(), false);
  const { status, message, type, param, code, retryAfterSeconds } = await failure(failing.models(), ServerError);
  assert.deepEqual({ message, type, param, code }, error);
  assert.deepEqual([status, retryAfterSeconds], [503, 5]);
});

test("a proxy without a server is not ready, and something else is neither ready nor healthy", async (context) => {
  for (const status of [502, 503, 504]) {
    const { url } = await stub(context, { status, body: "<h1>Nobody</h1>" });
    assert.equal(await new StellarByte({ baseUrl: url }).isReady(), false);
  }
  for (const body of ["<h1>It works!</h1>", "{}", "[]"]) {
    const other = new StellarByte({ baseUrl: (await stub(context, { body })).url });
    for (const answer of [other.isReady(), other.health()]) await failure(answer, UnexpectedAnswer);
  }
  const missing = new StellarByte({ baseUrl: (await stub(context, { status: 404, body: "" })).url });
  assert.equal((await failure(missing.isReady(), ServerError)).status, 404);
});

test("what is no text in an error object does not become one of its fields", async (context) => {
  const error = { message: "Too busy.", type: {}, param: ["model"], code: 429 };
  const { url } = await stub(context, { status: 429, body: JSON.stringify({ error }) });
  const { status, message, type, param, code } = await failure(new StellarByte({ baseUrl: url }).models(), ServerError);
  assert.deepEqual([status, message, type, param, code], [429, "Too busy.", null, null, null]);
});

test("a key that no header can carry is refused and not shown; an empty one is none", async (context) => {
  for (const name of ["apiKey", "adminApiKey"]) {
    for (const key of ["sesame\n", "open sesame", "sésame", "密钥"]) {
      assert.throws(
        () => new StellarByte({ [name]: key }),
        (error: Error) =>
          error.name === "TypeError" &&
          error.message.startsWith(`${name} must `) &&
          !error.message.includes(key.trim()),
      );
    }
  }
  const { url, asked } = await stub(context, { body: '{"version": "1.0", "freed_bytes": 0}' });
  await new StellarByte({ baseUrl: url, apiKey: "", adminApiKey: "" }).version();
  await new StellarByte({ baseUrl: url, apiKey: "key", adminApiKey: "" }).adapters.unload("mine");
  assert.deepEqual(
    asked.map(({ headers }) => headers.authorization),
    [undefined, "Bearer key"],
  );
});

test("times that timers cannot have are refused at once", async (context) => {
  for (const timeoutMs of [0, -1, NaN, Infinity, 2 ** 31]) {
    assert.throws(() => new StellarByte({ timeoutMs }), {
      name: "TypeError",
      message: /^timeoutMs must be .* is not\.$/,
    });
  }
  const { url } = await stub(context, { body: '{"version": "1.0"}' });
  assert.equal(await new StellarByte({ baseUrl: url, timeoutMs: 9999.5 }).version(), "1.0");
});

test("keys that are wrong, and names", async () => {
  const wrong = await failure(new StellarByte({ apiKey: "key-wrong" }).models(), ServerError);
  assert.deepEqual([wrong.status, wrong.type, wrong.code], [401, "authentication_error", "invalid_api_key"]);
  const refused = await failure(new StellarByte({ apiKey }).adapters.load("mine", "pirate"), ServerError);
  assert.deepEqual([refused.status, refused.type], [403, "permission_error"]);
  const missing = await failure(client.adapters.unload("nobody"), ServerError);
  assert.equal(missing.message, "There is no adapter 'nobody'.");
  assert.deepEqual([missing.status, missing.code, missing.param], [404, "adapter_not_found", "lora_name"]);
  assert.equal(missing.retryAfterSeconds, null);
});

test("the operator's key alone is enough", async () => {
  for (const keys of [{ apiKey: adminApiKey }, { adminApiKey }]) {
    const operator = new StellarByte(keys);
    await operator.adapters.load("mine", "pirate");
    assert.ok((await operator.models()).some((model) => model.id === "mine"));
    await operator.adapters.unload("mine");
  }
});

test("no answer", async (context) => {
  const server = http.createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const baseUrl = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  await new Promise((resolve) => server.close(resolve));
  const nobody = new StellarByte({ baseUrl });
  const { message } = await failure(nobody.models(), ConnectionFailed);
  assert.ok(message.startsWith(`The server at ${baseUrl} cannot be reached: `) && message.includes("ECONNREFUSED"));
  assert.equal(await nobody.isReady(), false);
  const silent = new StellarByte({ baseUrl: (await stub(context, null)).url, timeoutMs: 50 });
  assert.match((await failure(silent.version(), ConnectionFailed)).message, /did not answer in time\.$/);
});

test("an answer of something else is not taken for one of ours", async (context) => {
  for (const body of ["<h1>It works!</h1>", "{}", "null", '{"data": 1}', ""]) {
    const { url } = await stub(context, { body });
    const { message } = await failure(new StellarByte({ baseUrl: url }).models(), UnexpectedAnswer);
    assert.ok(message.startsWith(`The answer from ${url}/v1/models is not that of a StellarByte server: `));
  }
  const headers = { "Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT" };
  const { url } = await stub(context, { status: 502, headers, body: "<h1>Bad gateway</h1>" });
  const error = await failure(new StellarByte({ baseUrl: url }).models(), ServerError);
  assert.equal(error.message, `The answer from ${url}/v1/models is 502 Bad Gateway.`);
  assert.deepEqual([error.status, error.type, error.retryAfterSeconds], [502, null, null]);
});

test("addresses", async (context) => {
  const { url, asked } = await stub(context, { body: '{"version": "1.0"}' });
  assert.equal(await new StellarByte({ baseUrl: `${url}/llm/` }).version(), "1.0");
  assert.deepEqual(
    [asked[0]?.method, asked[0]?.url, asked[0]?.headers.authorization],
    ["GET", "/llm/version", undefined],
  );
  for (const baseUrl of ["127.0.0.1:8000", "localhost", "ftp://localhost", "http://", ""]) {
    assert.throws(() => new StellarByte({ baseUrl }), {
      name: "TypeError",
      message: /must be a URL such as http:\/\/127/,
    });
  }
});
