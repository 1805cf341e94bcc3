// Reads fields of forms; a value that cannot be used is marked, with the reason beside the field.

/** @import { Key } from "./i18n.js" */

import { byId } from "./elements.js";
import { t } from "./i18n.js";

/**
 * @param {string} id of the field; its problem is shown at `ID-problem`
 * @param {string} problem "": none
 */
export function mark(id, problem) {
  byId(id, HTMLInputElement).setAttribute("aria-invalid", String(problem !== ""));
  byId(`${id}-problem`, HTMLElement).textContent = problem;
  if (problem === "") return;
  const folded = byId(id, HTMLInputElement).closest("details");
  if (folded !== null) folded.open = true;
  byId(id, HTMLInputElement).focus();
}

/**
 * @param {string} id
 * @param {{ min: number, max: number, whole?: boolean }} bounds
 * @returns {number | null | "wrong"} null: the field is empty
 */
export function readNumber(id, { min, max, whole = false }) {
  const text = byId(id, HTMLInputElement).value.trim();
  const value = Number(text);
  /** @type {Key | null} */
  let problem = null;
  if (text !== "" && !Number.isFinite(value)) problem = "notANumber";
  else if (text !== "" && whole && !Number.isInteger(value)) problem = "notAnInteger";
  else if (text !== "" && (value < min || value > max)) problem = "notBetween";
  mark(id, problem === null ? "" : t(problem, { min, max }));
  if (problem !== null) return "wrong";
  return text === "" ? null : value;
}

// What the server takes as a suffix of a model's name, and as the name of an adapter.
const NAMES = { nameRule: /^[A-Za-z0-9._-]{1,64}$/, adapterRule: /^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$/ };

/**
 * A name.
 * @param {string} id
 * @param {{ required?: boolean, rule?: "nameRule" | "adapterRule" }} options
 * @returns {string} "": the field is empty; "wrong": it is marked
 */
export function readName(id, { required = false, rule = "nameRule" } = {}) {
  const text = byId(id, HTMLInputElement).value.trim();
  const isWrong = text === "" ? required : !NAMES[rule].test(text);
  mark(id, isWrong ? t(rule) : "");
  return isWrong ? "wrong" : text;
}
