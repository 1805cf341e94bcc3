// Questions and answers by column, and the requests made from them.

/** @import { Answer, ChatBody, Column, Message, Sampling } from "../types.js" */

export const MAX_COLUMNS = 4; // each streams over a separate connection, of which browsers allow six
export const MAX_SCALE = 8;
const TOP_LOGPROBS = 5;

/**
 * @param {string | null} model null: not yet known
 * @param {number} scale
 * @returns {Column}
 */
export function makeColumn(model = null, scale = 1) {
  return { model, scale, messages: [] };
}

/**
 * A new answer, requested now.
 * @param {string} model
 * @param {number | null} scale null without an adapter
 * @returns {Answer}
 */
export function makeAnswer(model, scale) {
  return {
    role: "assistant",
    content: "",
    reasoning: "",
    model,
    scale,
    state: "streaming",
    finishReason: null,
    failure: null,
    tokens: [],
    timing: { sentMs: 0, firstMs: null, lastMs: null, pieces: 0 },
    usage: null,
  };
}

/**
 * The body of the request for the column's last question. Earlier questions without an answer are omitted.
 * @param {Column} column
 * @param {{ system: string, sampling: Sampling, withLogprobs: boolean, isAdapter: boolean }} settings
 * @returns {ChatBody}
 */
export function requestBody(column, { system, sampling, withLogprobs, isAdapter }) {
  if (column.model === null) throw new Error("a column without a model cannot be asked");
  /** @type {ChatBody["messages"]} */
  const messages = [];
  if (system.trim() !== "") messages.push({ role: "system", content: system });
  for (const [index, message] of column.messages.entries()) {
    if (message.role !== "user") continue;
    const answer = column.messages[index + 1];
    const isLast = index >= column.messages.length - 2;
    if (!isLast && (answer === undefined || answer.content === "")) continue;
    messages.push({ role: "user", content: message.content });
    if (!isLast && answer !== undefined) messages.push({ role: "assistant", content: answer.content });
  }
  /** @type {ChatBody} */
  const body = { model: column.model, messages, ...sampling, stream_options: { include_usage: true } };
  if (isAdapter) body.adapter_scale = column.scale;
  if (withLogprobs) Object.assign(body, { logprobs: true, top_logprobs: TOP_LOGPROBS });
  return body;
}

/**
 * The last question of a column; null before the first.
 * @param {Column} column
 */
export function lastQuestion(column) {
  return column.messages.findLast((message) => message.role === "user") ?? null;
}

/**
 * The last answer shown; null before the first.
 * @param {Column} column
 * @returns {Answer | null}
 */
export function lastAnswer(column) {
  const last = column.messages[column.messages.length - 1];
  return last !== undefined && last.role === "assistant" ? last : null;
}

/**
 * Whether a retry is worse than the answer before it: the retry failed or was stopped without any text.
 * @param {Answer} answer
 * @param {Answer} before
 */
export function isNoBetter(answer, before) {
  return answer.state !== "done" && answer.content === "" && before.state !== "failed";
}

/**
 * Columns as text, without probabilities, which are much larger than the answers.
 * @param {readonly Column[]} columns
 */
export function columnsToText(columns) {
  const strip = (/** @type {Message} */ message) => (message.role === "user" ? message : { ...message, tokens: [] });
  return JSON.stringify(columns.map((column) => ({ ...column, messages: column.messages.map(strip) })));
}

/**
 * Columns from such a text; unfinished answers become stopped. Empty for any other text.
 * @param {string} text
 * @returns {Column[]}
 */
export function columnsFromText(text) {
  try {
    /** @type {Column[]} */
    const columns = JSON.parse(text);
    for (const message of columns.flatMap((column) => column.messages)) {
      if (message.role === "assistant" && message.state === "streaming") message.state = "stopped";
    }
    return columns;
  } catch {
    return [];
  }
}
