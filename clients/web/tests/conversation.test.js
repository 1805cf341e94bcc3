// What is sent is what was said and set, and nothing else; numbers of an answer are those of its stream.

import assert from "node:assert/strict";
import { test } from "node:test";

import { ApiError, ServerGone, StreamBroken } from "../stellarbyte_web/api.js";
import { fillAnswer, measures } from "../stellarbyte_web/ask.js";
import {
  columnsFromText,
  columnsToText,
  makeAnswer,
  makeColumn,
  requestBody,
} from "../stellarbyte_web/conversation.js";
import { FIELDS, readField, readSampling } from "../stellarbyte_web/sampling.js";
import { tokenTexts } from "../stellarbyte_web/token-text.js";

const NOTHING = { system: "", sampling: {}, withLogprobs: false, isAdapter: false };
const question = (content) => ({ role: "user", content });
const answered = (content) => ({ ...makeAnswer("m", null), content, state: "done" });

test("only what was set is sent", () => {
  const column = { ...makeColumn("m", 1.5), messages: [question("Hi")] };
  const plain = { model: "m", messages: [question("Hi")], stream_options: { include_usage: true } };
  assert.deepEqual(requestBody(column, NOTHING), plain);
  const settings = { system: "Be kind.", sampling: { top_k: 5 }, withLogprobs: true, isAdapter: true };
  assert.deepEqual(requestBody(column, settings), {
    ...plain,
    messages: [{ role: "system", content: "Be kind." }, question("Hi")],
    top_k: 5,
    adapter_scale: 1.5,
    logprobs: true,
    top_logprobs: 5,
  });
});

test("questions that got no answer are not sent again, except the last", () => {
  const column = makeColumn("m");
  column.messages = [question("1"), answered("one"), question("2"), answered(""), question("3"), answered("")];
  const sent = requestBody(column, NOTHING).messages.map(({ content }) => content);
  assert.deepEqual(sent, ["1", "one", "3"]);
});

test("a conversation is the same after it was kept, without probabilities, and with what was on its way stopped", () => {
  const column = makeColumn("adapter", 0.5);
  const answer = {
    ...makeAnswer("adapter", 0.5),
    content: "half",
    tokens: [{ token: "half", logprob: 0, bytes: null, top_logprobs: [] }],
  };
  column.messages = [question("Hi"), answer];
  const [kept] = columnsFromText(columnsToText([column]));
  assert.deepEqual(kept, { ...column, messages: [question("Hi"), { ...answer, tokens: [], state: "stopped" }] });
  assert.deepEqual(columnsFromText(""), []);
  assert.deepEqual(columnsFromText("{"), []);
});

const piece = (content, finish_reason = null) => ({ choices: [{ delta: { content }, logprobs: null, finish_reason }] });
const USAGE = {
  prompt_tokens: 9,
  completion_tokens: 4,
  prompt_tokens_details: { cached_tokens: 5 },
  evicted_tokens: 2,
};

function fill(chunks, error = null) {
  const answer = makeAnswer("m", null);
  let nowMs = 1000;
  let changes = 0;
  const abort = new AbortController();
  const server = {
    async *streamChat() {
      for (const chunk of chunks) {
        nowMs += 100;
        yield chunk;
      }
      if (error === "abort") abort.abort();
      if (error !== null) throw error === "abort" ? abort.signal.reason : error;
    },
  };
  const options = { signal: abort.signal, changed: () => (changes += 1), now: () => nowMs };
  return fillAnswer(server, {}, answer, options).then(() => ({ answer, changes }));
}

test("an answer is measured by its stream", async () => {
  const chunks = [
    { choices: [{ delta: { role: "assistant", content: "" }, finish_reason: null }] },
    piece("a"),
    piece("b"),
    piece(null, "length"),
    { choices: [], usage: USAGE },
  ];
  const { answer, changes } = await fill(chunks);
  assert.deepEqual([answer.content, answer.state, answer.finishReason, changes], ["ab", "done", "length", 6]);
  assert.deepEqual(measures(answer), {
    firstTokenMs: 200,
    tokensPerSecond: 15, // three more tokens in the 200 ms after the first
    promptTokens: 9,
    completionTokens: 4,
    isExact: true,
    cachedTokens: 5,
    evictedTokens: 2,
  });
});

test("reasoning is kept apart from the answer, and is the first to be measured", async () => {
  const thought = (text) => ({ choices: [{ delta: { reasoning_content: text }, finish_reason: null }] });
  const { answer } = await fill([thought("wh"), thought("y"), piece("so"), piece(null, "stop")]);
  assert.deepEqual([answer.reasoning, answer.content], ["why", "so"]);
  assert.equal(measures(answer).completionTokens, 3);
});

test("an answer that failed or was stopped keeps what it has", async () => {
  const cases = [
    [new StreamBroken(), "failed", "broken"],
    [new ServerGone(), "failed", "gone"],
    [new ApiError(503, "Shutting down."), "failed", "refused"],
    ["abort", "stopped", undefined],
  ];
  for (const [error, state, kind] of cases) {
    const { answer } = await fill([piece("a"), piece("b")], error);
    assert.deepEqual([answer.content, answer.state, answer.failure?.kind], ["ab", state, kind]);
    assert.deepEqual([measures(answer).completionTokens, measures(answer).isExact], [2, false]);
  }
  await assert.rejects(fill([], new TypeError("a mistake")), TypeError);
});

test("fields of the sampling controls hold what the server takes", () => {
  const field = (name) => FIELDS.find((one) => one.name === name);
  const read = (name, text) => readField(field(name), text);
  for (const [name, text, value] of [
    ["temperature", "", undefined],
    ["temperature", " 0.7 ", 0.7],
    ["temperature", "0", 0],
    ["temperature", "2", 2],
    ["top_p", "1e-3", 0.001],
    ["top_p", "0", 0],
    ["top_k", "-1", -1],
    ["seed", "-5", -5],
    ["repetition_penalty", "1.1", 1.1],
    ["context_overflow", "slide", "slide"],
    ["stop", "\nEnd\n\\n\\nUser:\n a\\\\n", ["End", "\n\nUser:", " a\\n"]],
  ]) {
    assert.deepEqual(read(name, text), { value }, JSON.stringify([name, text]));
  }
  for (const [name, text, key] of [
    ["temperature", "warm", "notANumber"],
    ["temperature", "0x1", "notANumber"],
    ["temperature", "1,5", "notANumber"],
    ["temperature", "2.01", "notBetween"],
    ["temperature", "-1", "notBetween"],
    ["top_p", "1.01", "notBetween"],
    ["top_k", "1.5", "notAnInteger"],
    ["top_k", "-2", "notAtLeast"],
    ["max_tokens", "0", "notAtLeast"],
    ["min_p", "1.1", "notBetween"],
    ["seed", "1e300", "notAtLeast"],
    ["stop", Array.from({ length: 33 }, (_, i) => i).join("\n"), "tooManyLines"],
    ["stop", "x".repeat(1001), "tooLong"],
  ]) {
    assert.equal(read(name, text).problem?.key, key, JSON.stringify([name, text]));
  }
});

test("sampling is what its fields say, or nothing while one is wrong", () => {
  assert.deepEqual(readSampling({}), {});
  assert.deepEqual(readSampling({ temperature: "0", stop: "x", top_k: " " }), { temperature: 0, stop: ["x"] });
  assert.equal(readSampling({ temperature: "0", top_p: "7" }), null);
});

test("a character whose bytes lie in several tokens is shown once, by the last of them", () => {
  const texts = tokenTexts();
  const [a, b, c] = new TextEncoder().encode("中");
  const shown = [[a], [b], [c], [0x61], [0xff], [0x62]].map((bytes) =>
    texts({ token: "\ufffd", logprob: 0, bytes, top_logprobs: [] }),
  );
  assert.deepEqual(shown, ["·", "·", "中", "a", "\ufffd", "b"]);
});
