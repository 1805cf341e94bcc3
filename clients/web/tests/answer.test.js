// What is said of an answer: to ears without marks, and after a failure whether another try can help.

import assert from "node:assert/strict";
import { test } from "node:test";

import { isNoBetter, makeAnswer } from "../stellarbyte_web/conversation.js";
import { canRetry } from "../stellarbyte_web/failures.js";
import { spokenText } from "../stellarbyte_web/spoken-text.js";

test("an answer is read out without marks, a line for each of its parts", () => {
  for (const [text, spoken] of [
    ["The capital of **France** is `Paris`.", "The capital of France is Paris."],
    ["# Title\n\nOne\ntwo  \nthree\n\n---\n\n> quoted", "Title\nOne\ntwo\nthree\nquoted"],
    ["- a\n- b\n  - c", "a\nb\nc"],
    ["3. x\n4. y\n\n   z", "3. x\n4. y\nz"],
    ["```python\nprint(1)\n```", "print(1)"],
    ["| a | b |\n|---|---|\n| 1 | 2 |", "a, b\n1, 2"],
    ["[here](https://x.example) ![picture](https://x.example/p.png)", "here picture"],
    ["", ""],
  ]) {
    assert.equal(spokenText(text), spoken, JSON.stringify(text));
  }
});

test("another try is offered where it may help: not for what the server refused as wrong", () => {
  const refused = (status) => ({ kind: "refused", status, message: "", retryAfterS: null });
  const can = [null, 401, 429, 500, 502, 503].map((status) => canRetry(refused(status)));
  const cannot = [400, 403, 404, 413, 422].map((status) => canRetry(refused(status)));
  assert.deepEqual([new Set(can), new Set(cannot)], [new Set([true]), new Set([false])]);
  for (const kind of ["gone", "broken"]) assert.ok(canRetry({ ...refused(null), kind }));
});

test("a try that gave nothing does not take a good answer's place", () => {
  const answer = (state, content) => ({ ...makeAnswer("m", null), state, content });
  const good = answer("done", "good");
  assert.ok(isNoBetter(answer("failed", ""), good));
  assert.ok(!isNoBetter(answer("failed", "half"), good));
  assert.ok(isNoBetter(answer("stopped", ""), good));
  assert.ok(!isNoBetter(answer("done", ""), good));
  assert.ok(!isNoBetter(answer("failed", ""), answer("failed", "")));
});
