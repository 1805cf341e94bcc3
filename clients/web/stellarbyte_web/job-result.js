// The result of a job: its figures on the validation file, beside the base and the version before, and its publication.

/** @import { Compared, TuningJob } from "../types.js" */

import { make } from "./elements.js";
import { formatNumber, t } from "./i18n.js";

const COLUMNS = /** @type {const} */ ([
  ["base_valid", "columnBase"],
  ["previous_valid", "columnBefore"],
  ["valid", "columnNew"],
]);
const LOSS = { minimumFractionDigits: 3, maximumFractionDigits: 3 };
const SHARE = /** @type {const} */ ({ style: "percent", maximumFractionDigits: 1 });

/**
 * @param {TuningJob} job
 * @returns {HTMLElement[]} none while there is nothing to say
 */
export function resultView(job) {
  const table = job.status === "succeeded" ? tableOf(job) : [];
  const sentence = publicationOf(job);
  return sentence === "" ? table : [...table, make("p", { class: "note" }, sentence)];
}

/** @param {TuningJob} job */
function tableOf({ losses, exact_match: exact }) {
  /** @type {[string, Compared, Intl.NumberFormatOptions][]} */
  const figures = [[t("validLoss"), losses, LOSS]];
  if (exact !== null) figures.push([t("exactMatch"), exact, SHARE]);
  const columns = COLUMNS.filter(([column]) => figures.some(([, values]) => values[column] !== null));
  if (columns.length === 0) return [];
  const heads = columns.map(([, key]) => make("th", { scope: "col", class: "amount" }, t(key)));
  const rows = figures.map(([name, values, form]) => {
    const cells = columns.map(([column]) => make("td", { class: "amount" }, shown(values[column], form)));
    return make("tr", {}, make("th", { scope: "row" }, name), ...cells);
  });
  const head = make("thead", {}, make("tr", {}, make("th", { scope: "col" }, t("resultTitle")), ...heads));
  const table = make("table", {}, head, make("tbody", {}, ...rows));
  return [make("div", { class: "table-frame", tabindex: "0" }, table)];
}

/**
 * @param {number | null} value
 * @param {Intl.NumberFormatOptions} form
 */
function shown(value, form) {
  return value === null ? "–" : formatNumber(value, form);
}

/** @param {TuningJob} job */
function publicationOf({ status, publish }) {
  if (publish === null || status === "failed" || status === "cancelled") return "";
  const { name, version, error } = publish;
  if (error !== null) return t("notLive", { name, error });
  const share = formatNumber(publish.share ?? 1, SHARE);
  return version === null ? t("willBeLive", { name, share }) : t("wentLive", { name, version, share });
}
