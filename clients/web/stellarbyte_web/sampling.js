// The sampling controls: which there are, what may stand in them, and what they make of a request. Knows no page.

/** @import { Problem, Sampling, SamplingField } from "../types.js" */

const MAX_STOP_STRINGS = 4;
const MAX_STOP_CHARACTERS = 1000;
const MAX_SEED = Number.MAX_SAFE_INTEGER;

/** @type {readonly SamplingField[]} Bounds are the server's. */
export const FIELDS = [
  { name: "temperature", kind: "number", min: 0, max: 2 },
  { name: "top_p", kind: "number", min: 0, max: 1, isAbove: true },
  { name: "top_k", kind: "integer", min: -1, max: 2 ** 31 - 1 },
  { name: "min_p", kind: "number", min: 0, max: 1 },
  { name: "max_tokens", kind: "integer", min: 1, max: MAX_SEED },
  { name: "seed", kind: "integer", min: -MAX_SEED, max: MAX_SEED },
  { name: "repetition_penalty", kind: "number", min: 0.01, max: 100 },
  { name: "stop", kind: "lines" },
  { name: "context_overflow", kind: "choice", choices: ["error", "slide"] },
];

/**
 * What was typed into a field: its value, undefined when it is empty, or what is wrong with it.
 * @param {SamplingField} field
 * @param {string} text
 * @returns {{ value: number | string | string[] | undefined } | { problem: Problem }}
 */
export function readField(field, text) {
  if (field.kind === "lines") return readLines(text);
  const trimmed = text.trim();
  if (trimmed === "") return { value: undefined };
  if (field.kind === "choice") return { value: trimmed };
  const isNumber = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(trimmed);
  const value = Number(trimmed);
  if (!isNumber || !Number.isFinite(value)) return { problem: { key: "notANumber" } };
  if (field.kind === "integer" && !Number.isInteger(value)) return { problem: { key: "notAnInteger" } };
  if (value < field.min || value > field.max || (field.isAbove && value === field.min)) {
    const key = field.isAbove ? "notAboveOrTo" : field.max > 1e6 ? "notAtLeast" : "notBetween";
    return { problem: { key, values: { min: field.min, max: field.max } } };
  }
  return { value };
}

/**
 * Stop strings, one a line; \n, \t and \\ stand for what cannot be typed there.
 * @param {string} text
 * @returns {{ value: string[] | undefined } | { problem: Problem }}
 */
function readLines(text) {
  const escapes = /** @type {Record<string, string>} */ ({ n: "\n", t: "\t", "\\": "\\" });
  const lines = text.split("\n").filter((line) => line !== "");
  if (lines.length === 0) return { value: undefined };
  if (lines.length > MAX_STOP_STRINGS) return { problem: { key: "tooManyLines", values: { max: MAX_STOP_STRINGS } } };
  const value = lines.map((line) => line.replace(/\\([nt\\])/g, (_, letter) => escapes[letter] ?? ""));
  if (value.some((line) => [...line].length > MAX_STOP_CHARACTERS)) {
    return { problem: { key: "tooLong", values: { max: MAX_STOP_CHARACTERS } } };
  }
  return { value };
}

/**
 * What the controls set; null when something in them is wrong.
 * @param {Record<string, string>} texts by the fields' names
 * @returns {Sampling | null}
 */
export function readSampling(texts) {
  /** @type {Record<string, unknown>} */
  const sampling = {};
  for (const field of FIELDS) {
    const read = readField(field, texts[field.name] ?? "");
    if ("problem" in read) return null;
    if (read.value !== undefined) sampling[field.name] = read.value;
  }
  return sampling;
}
