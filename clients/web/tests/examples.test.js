// Examples are read from each form that people have them in; a line that cannot be used is named with its reason.

import assert from "node:assert/strict";
import { test } from "node:test";

import { readRecords } from "../stellarbyte_web/csv.js";
import { divide, formatOf, jsonLines, readExamples } from "../stellarbyte_web/examples.js";
import { lossPath, topOf } from "../stellarbyte_web/loss-chart.js";

const chat = (question, answer) => [
  { role: "user", content: question },
  { role: "assistant", content: answer },
];
const chats = ({ examples }) => examples.map(({ messages }) => messages);
const problems = (text, format) => readExamples(text, format).problems.map(({ line, key }) => [line, key]);
const line = (...messages) => JSON.stringify({ messages });
const [question, answer] = chat("q", "a");

test("pairs are a question, and its answer until a blank line", () => {
  const read = readExamples("\r\nWho, me?\r\nYes,\r\nyou.\r\n \r\n\r\nAnd I?\r\nNo.");
  assert.equal(read.format, "pairs");
  assert.deepEqual(chats(read), [chat("Who, me?", "Yes,\nyou."), chat("And I?", "No.")]);
  assert.deepEqual(
    read.examples.map(({ line }) => line),
    [2, 7],
  );
  assert.deepEqual(JSON.parse(read.examples[0].json), { messages: chat("Who, me?", "Yes,\nyou.") });
  assert.deepEqual(problems("q\na\n\nalone\n\nq\na"), [[4, "exampleNoAnswer"]]);
});

test("two columns are read as spreadsheets write them", () => {
  const read = readExamples('Question,Answer\r\n"a ""b"", c","two\nlines"\r\n\r\nx,y\r\n');
  assert.equal(read.format, "csv");
  assert.deepEqual(chats(read), [chat('a "b", c', "two\nlines"), chat("x", "y")]);
  assert.deepEqual(
    read.examples.map(({ line }) => line),
    [2, 5],
  );
  assert.deepEqual(chats(readExamples('问题\t回答\n你好？\t"你\t好"\n')), [chat("你好？", "你\t好")]);
  assert.deepEqual(problems('a,b\nc\nd,\n,e\nf,g,h\ni,"j', "csv"), [
    [2, "exampleNotTwoColumns"],
    [3, "exampleNoAnswer"],
    [4, "exampleNoQuestion"],
    [5, "exampleNotTwoColumns"],
    [6, "exampleQuoteOpen"],
  ]);
  assert.deepEqual(readRecords('a"b,"c"d', ",").records, [{ line: 1, fields: ['a"b', "cd"] }]);
});

test("chats in JSON lines are kept as they are", () => {
  const tool = JSON.stringify({ messages: [question, answer], tools: [{ type: "function" }] });
  const parts = line({ role: "user", content: [{ type: "text", text: "q" }] }, answer);
  const text = `\ufeff${line(question, answer)}\n\n${tool}\n${parts}\n{"prompt": "q", "completion": "a"}\n`;
  const read = readExamples(text);
  assert.equal(read.format, "jsonl");
  assert.deepEqual(
    read.examples.map(({ json }) => json),
    text.slice(1).split("\n").filter(Boolean),
  );
  assert.deepEqual(chats(read), Array(4).fill(chat("q", "a")));
});

test("an example has the same line in its file as in the text", () => {
  const { examples } = readExamples('a,"b\nb"\n\nc,d\ne,f', "csv");
  const { training, validation } = divide(examples, 33);
  assert.deepEqual(jsonLines(training).split("\n"), [examples[0].json, "", "", "", examples[2].json]);
  assert.deepEqual(jsonLines(validation).split("\n"), ["", "", "", examples[1].json]);
  assert.equal(jsonLines([]), "");
});

test("each kind of a bad line has its reason", () => {
  const bad = [
    ["{", "exampleNotJson"],
    ["3", "exampleNotObject"],
    [`[${line(question, answer)}]`, "exampleNotObject"],
    ["[", "exampleNotObject"],
    ["{}", "exampleNoMessages"],
    [line(), "exampleNoMessages"],
    [line(null, answer), "exampleRole"],
    [line({ role: "robot", content: "q" }, answer), "exampleRole"],
    [line({ role: "user", content: "" }, answer), "exampleNoContent"],
    [line({ role: "user", content: 3 }, answer), "exampleNoContent"],
    [line(question), "exampleAnswerNotLast"],
    ['{"prompt": "", "completion": "a"}', "exampleNoQuestion"],
    ['{"prompt": "q"}', "exampleNoAnswer"],
  ];
  const text = bad.map(([text]) => text).join("\n");
  assert.deepEqual(
    problems(text, "jsonl"),
    bad.map(([, key], index) => [index + 1, key]),
  );
});

test("the form is found in the text, unless a file's name has it", () => {
  assert.equal(formatOf(' \n{"a": 1}', ""), "jsonl");
  assert.equal(formatOf("[\n{}]", ""), "jsonl");
  assert.equal(formatOf("[Sir] who?\nI.", ""), "pairs");
  assert.equal(formatOf("a, b\nc, d\n\ne, f\ng, h", ""), "pairs");
  assert.equal(formatOf("a, b\nc, d\n\ne, f\ng, h", "x.CSV"), "csv");
  assert.equal(formatOf('"a","b\n\nc"\nd,e', ""), "csv");
  assert.equal(formatOf("a\nb", "x.tsv"), "tsv");
  assert.equal(formatOf("a\nb", "x.txt"), "pairs");
  assert.equal(formatOf("", ""), "pairs");
});

test("examples are held out evenly, and one is always left to learn", () => {
  const examples = Array.from({ length: 40 }, (_, line) => ({ line, messages: [], json: "" }));
  const { training, validation } = divide(examples, 10);
  assert.deepEqual(
    validation.map(({ line }) => line),
    [5, 15, 25, 35],
  );
  assert.equal(training.length, 36);
  assert.deepEqual(divide(examples, 0).validation, []);
  for (const [count, held] of [
    [0, 0],
    [1, 0],
    [2, 1],
    [3, 1],
  ])
    assert.equal(divide(examples.slice(0, count), 10).validation.length, Math.max(0, held));
});

test("losses are drawn by step on a scale that ends at a round number", () => {
  assert.deepEqual(
    [0.0001, 0.9, 1.1, 2.5, 7, 10, 11].map((loss) => topOf([loss])),
    [0.01, 1, 1.2, 3, 8, 10, 12],
  );
  assert.equal(
    lossPath(
      [
        [0, 2],
        [5, 1],
        [10, 3],
      ],
      10,
      2,
    ),
    "M0.0 0.0L300.0 80.0L600.0 0.0",
  );
});
