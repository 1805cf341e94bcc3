// What the browser does not keep is known until the page is left.

import assert from "node:assert/strict";
import { test } from "node:test";

import { session } from "../stellarbyte_web/storage.js";

/** @param {string} name of what each access to the storage throws */
function block(name) {
  const get = () => {
    throw new DOMException("no", name);
  };
  Object.defineProperty(globalThis, "sessionStorage", { get, configurable: true });
}

test("a storage that is blocked or full is replaced by memory, and only the full one is told", () => {
  for (const [name, isKept] of [
    ["SecurityError", true],
    ["QuotaExceededError", false],
  ]) {
    block(name);
    assert.equal(session.write("key", name), isKept);
    assert.equal(session.read("key"), name);
    assert.equal(session.read("other"), "");
  }
});
