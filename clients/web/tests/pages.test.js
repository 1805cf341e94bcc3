// Every word on the pages is in both languages, and every element that the scripts look for is there.

import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { test } from "node:test";

import { chinese } from "../stellarbyte_web/chinese.js";
import { english } from "../stellarbyte_web/english.js";

const folder = new URL("../stellarbyte_web/", import.meta.url);
const names = readdirSync(folder, { withFileTypes: true }).filter((entry) => entry.isFile()); // no __pycache__
const files = new Map(names.map(({ name }) => [name, readFileSync(new URL(name, folder), "utf8")]));
const pages = ["index.html", "tune.html", "status.html"].map((name) => files.get(name));
const scripts = [...files]
  .filter(([name]) => name.endsWith(".js") && !["english.js", "chinese.js"].includes(name))
  .map(([, text]) => text);

test("both languages have the same places to fill", () => {
  const places = (text) => [...text.matchAll(/\{\w+\}/g)].map(([place]) => place).sort();
  for (const [key, text] of Object.entries(english)) assert.deepEqual(places(chinese[key]), places(text), key);
});

test("marked text is known, and what stands there is the English of it", () => {
  for (const page of pages) {
    for (const [, key, text] of page.matchAll(/data-i18n="(\w+)"[^>]*>([^<]*)</g))
      assert.equal(text.trim(), english[key], key);
    for (const [, key] of page.matchAll(/data-i18n-[a-z-]+="(\w+)"/g)) assert.ok(key in english, key);
  }
});

test("no text is left over", () => {
  const sources = [...pages, ...scripts].join("\n");
  const unused = Object.keys(english).filter((key) => !new RegExp(`["']${key}["']`).test(sources));
  assert.deepEqual(unused, []);
});

test("pages load nothing but their own files, by relative addresses, and hold no script or style", () => {
  for (const page of pages) {
    for (const [, address] of page.matchAll(/(?:src|href)="([^"]*)"/g)) {
      assert.match(address, /^(web\/[\w.-]+|\.\/|tune|status|#[\w-]+)$/);
      if (address.startsWith("web/")) assert.ok(files.has(address.slice(4)), address);
    }
    assert.doesNotMatch(page, /<style|style=|\son\w+=|<script(?![^>]*src=)/);
  }
  for (const script of scripts) {
    assert.doesNotMatch(script, /innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function/);
    for (const [, name] of script.matchAll(/from "\.\/([\w.-]+)"/g)) assert.ok(files.has(name), name);
  }
});

test("every file says in its first line what it is", () => {
  for (const [name, text] of files) {
    if (/\.(js|css)$/.test(name)) assert.match(text, /^(\/\/|\/\*) [A-Z].+/, name);
  }
});
