// Parses the texts of the sampling controls, for requests.

import { SAMPLING_FIELDS } from "./sampling-fields.js";

/** @import { Problem, Sampling, SamplingField } from "../types.js" */

/** @type {readonly SamplingField[]} */
export const FIELDS = SAMPLING_FIELDS;

/**
 * Parse the text of a field: its value, undefined if it is empty, or its problem.
 * @param {SamplingField} field
 * @param {string} text
 * @returns {{ value: number | string | string[] | undefined } | { problem: Problem }}
 */
export function readField(field, text) {
  if (field.kind === "lines") return readLines(field, text);
  const trimmed = text.trim();
  if (trimmed === "") return { value: undefined };
  if (field.kind === "choice") return { value: trimmed };
  const isNumber = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(trimmed);
  const value = Number(trimmed);
  if (!isNumber || !Number.isFinite(value)) return { problem: { key: "notANumber" } };
  if (field.kind === "integer" && !Number.isInteger(value)) return { problem: { key: "notAnInteger" } };
  if (value < field.min || value > field.max) {
    const key = field.max > 1e6 ? "notAtLeast" : "notBetween";
    return { problem: { key, values: { min: field.min, max: field.max } } };
  }
  return { value };
}

/**
 * Stop strings, one per line; \n, \t and \\ are escapes.
 * @param {{ maxLines: number, maxCharacters: number }} field
 * @param {string} text
 * @returns {{ value: string[] | undefined } | { problem: Problem }}
 */
function readLines(field, text) {
  const escapes = /** @type {Record<string, string>} */ ({ n: "\n", t: "\t", "\\": "\\" });
  const lines = text.split("\n").filter((line) => line !== "");
  if (lines.length === 0) return { value: undefined };
  if (lines.length > field.maxLines) return { problem: { key: "tooManyLines", values: { max: field.maxLines } } };
  const value = lines.map((line) => line.replace(/\\([nt\\])/g, (_, letter) => escapes[letter] ?? ""));
  if (value.some((line) => [...line].length > field.maxCharacters)) {
    return { problem: { key: "tooLong", values: { max: field.maxCharacters } } };
  }
  return { value };
}

/**
 * The sampling parameters of all controls; null if one is invalid.
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
