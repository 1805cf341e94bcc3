// Reads examples for fine-tuning: chats as JSON lines, pairs in blocks, or two columns; with quick checks of each.

/** @import { Example, ExampleFormat, ExampleProblem, Examples } from "../types.js" */

import { readRecords } from "./csv.js";

const ROLES = new Set(["system", "developer", "user", "assistant", "tool"]);
const HEADS = new Set(
  [
    ..."question answer prompt completion user assistant input output instruction response q a".split(" "),
    ..."问题 提问 问 回答 答案 答 输入 输出 指令 回复".split(" "),
  ].map((word) => word.toLowerCase()),
);

/** An example cannot be used. */
class Unusable extends Error {
  /** @param {ExampleProblem["key"]} key */
  constructor(key) {
    super(key);
    this.key = key;
  }
}

/**
 * The examples of a text, and the problems of the lines that cannot be used.
 * @param {string} text
 * @param {ExampleFormat | "auto"} format
 * @param {string} filename its ending decides before the text does; "" if the text was pasted
 * @returns {Examples}
 */
export function readExamples(text, format = "auto", filename = "") {
  const plain = text.replace(/^\ufeff/, "").replace(/\r\n?/g, "\n");
  const chosen = format === "auto" ? formatOf(plain, filename) : format;
  /** @type {Example[]} */
  const examples = [];
  /** @type {ExampleProblem[]} */
  const problems = [];
  for (const { line, read } of READERS[chosen](plain)) {
    try {
      examples.push({ line, ...read() });
    } catch (error) {
      if (!(error instanceof Unusable)) throw error;
      problems.push({ line, key: error.key });
    }
  }
  return { format: chosen, examples, problems };
}

/**
 * @param {string} text
 * @param {string} filename
 * @returns {ExampleFormat}
 */
export function formatOf(text, filename) {
  const ending = /\.(jsonl|ndjson|json|csv|tsv)$/.exec(filename.toLowerCase())?.[1];
  if (ending === "csv" || ending === "tsv") return ending;
  const start = text.trimStart();
  if (ending !== undefined || start.startsWith("{") || /^\[\s*[{[]/.test(start)) return "jsonl";
  if (/^[^\n]*\t/.test(start)) return "tsv";
  const hasBlocks = /\S[^\n]*\n\s*\n\s*\S/.test(text) && !start.startsWith('"');
  const { records, isOpen } = readRecords(text, ",");
  const isTable = records.length > 0 && !isOpen && records.every(({ fields }) => fields.length === 2);
  return isTable && (isHead(records[0]) || !hasBlocks) ? "csv" : "pairs";
}

/**
 * Divide examples into those to learn and those held out, evenly over the text.
 * @param {readonly Example[]} examples
 * @param {number} percent held out; at least one example, unless it is 0 or there is only one example
 */
export function divide(examples, percent) {
  const wanted = Math.round((examples.length * percent) / 100);
  const count = percent === 0 ? 0 : Math.min(Math.max(1, wanted), examples.length - 1);
  const held = new Set(Array.from({ length: count }, (_, i) => Math.floor(((i + 0.5) * examples.length) / count)));
  return {
    training: examples.filter((_, index) => !held.has(index)),
    validation: examples.filter((_, index) => held.has(index)),
  };
}

/**
 * Examples as a file, each in the line that it has in the text, which the server's errors then name.
 * @param {readonly Example[]} examples
 */
export function jsonLines(examples) {
  let last = 1;
  const lines = examples.map(({ line, json }) => {
    const breaks = "\n".repeat(line - last);
    last = line;
    return breaks + json;
  });
  return lines.join("");
}

/** @typedef {{ line: number, read: () => Omit<Example, "line"> }} Unread one that is not yet checked */

/** @type {Record<ExampleFormat, (text: string) => Unread[]>} */
const READERS = {
  jsonl: (text) => linesOf(text).map(({ line, text }) => ({ line, read: () => ofJson(text) })),
  pairs: (text) => blocksOf(text).map(({ line, lines }) => ({ line, read: () => ofBlock(lines) })),
  csv: (text) => ofTable(text, ","),
  tsv: (text) => ofTable(text, "\t"),
};

/** @param {string} text */
function linesOf(text) {
  const lines = text.split("\n").map((text, index) => ({ line: index + 1, text }));
  return lines.filter(({ text }) => text.trim() !== "");
}

/** @param {string} text */
function blocksOf(text) {
  /** @type {{ line: number, lines: string[] }[]} */
  const blocks = [];
  let isInside = false;
  for (const [index, line] of text.split("\n").entries()) {
    const isEmpty = line.trim() === "";
    if (!isEmpty && !isInside) blocks.push({ line: index + 1, lines: [] });
    if (!isEmpty) blocks[blocks.length - 1]?.lines.push(line);
    isInside = !isEmpty;
  }
  return blocks;
}

/**
 * @param {string} text
 * @param {"," | "\t"} separator
 * @returns {Unread[]}
 */
function ofTable(text, separator) {
  const { records, isOpen } = readRecords(text, separator);
  return records.slice(isHead(records[0]) ? 1 : 0).map(({ line, fields }, index, all) => ({
    line,
    read: () => {
      if (isOpen && index === all.length - 1) throw new Unusable("exampleQuoteOpen");
      if (fields.length !== 2) throw new Unusable("exampleNotTwoColumns");
      return pair(fields[0] ?? "", fields[1] ?? "");
    },
  }));
}

/** @param {{ fields: string[] } | undefined} record */
function isHead(record) {
  return record?.fields.length === 2 && record.fields.every((field) => HEADS.has(field.toLowerCase()));
}

/** @param {string[]} lines the question, and the lines of its answer */
function ofBlock([question = "", ...answer]) {
  return pair(question.trim(), answer.join("\n").trim());
}

/**
 * @param {string} question
 * @param {string} answer
 */
function pair(question, answer) {
  if (question === "") throw new Unusable("exampleNoQuestion");
  if (answer === "") throw new Unusable("exampleNoAnswer");
  const messages = [
    { role: "user", content: question },
    { role: "assistant", content: answer },
  ];
  return { messages, json: JSON.stringify({ messages }) };
}

/**
 * A line is sent as it is; the server checks the rest of it.
 * @param {string} line
 */
function ofJson(line) {
  const record = parsed(line);
  if (record === null || typeof record !== "object" || Array.isArray(record)) throw new Unusable("exampleNotObject");
  const { messages, prompt, completion } = record;
  if (messages === undefined && (prompt !== undefined || completion !== undefined)) {
    const texts = [prompt, completion].map((text) => (typeof text === "string" ? text : ""));
    return { messages: pair(texts[0] ?? "", texts[1] ?? "").messages, json: line };
  }
  if (!Array.isArray(messages) || messages.length === 0) throw new Unusable("exampleNoMessages");
  const shown = messages.map(checkedMessage);
  if (shown[shown.length - 1]?.role !== "assistant") throw new Unusable("exampleAnswerNotLast");
  return { messages: shown, json: line };
}

/**
 * @param {string} line
 * @returns {any}
 */
function parsed(line) {
  try {
    return JSON.parse(line);
  } catch {
    throw new Unusable(line.trimStart().startsWith("[") ? "exampleNotObject" : "exampleNotJson");
  }
}

/** @param {any} message */
function checkedMessage(message) {
  if (!ROLES.has(message?.role)) throw new Unusable("exampleRole");
  const { role, content, tool_calls: calls } = message;
  const text = Array.isArray(content) ? content.map((part) => part?.text ?? "").join("") : (content ?? "");
  if (typeof text !== "string") throw new Unusable("exampleNoContent");
  const isCall = Array.isArray(calls) && calls.length > 0;
  if (text === "" && !isCall) throw new Unusable("exampleNoContent");
  return { role: String(role), content: text === "" ? JSON.stringify(calls) : text };
}
