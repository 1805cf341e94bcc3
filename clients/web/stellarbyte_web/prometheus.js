// Reads numbers from Prometheus' text format.

/** @import { Sample } from "../types.js" */

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{.*\})?[ \t]+(\S+)(?:[ \t]+-?\d+)?$/;

/**
 * All samples of a scrape, without their labels. Other lines are skipped.
 * @param {string} text
 * @returns {Sample[]}
 */
export function parseMetrics(text) {
  return text.split("\n").flatMap((line) => {
    const found = SAMPLE.exec(line.trim());
    if (found === null) return [];
    const value = valueOf(/** @type {string} */ (found[2]));
    return value === null ? [] : [{ name: /** @type {string} */ (found[1]), value }];
  });
}

/** @param {string} text */
function valueOf(text) {
  const special = /** @type {Record<string, number>} */ ({ "+Inf": Infinity, "-Inf": -Infinity, NaN });
  if (Object.hasOwn(special, text)) return /** @type {number} */ (special[text]);
  const value = Number(text);
  return Number.isNaN(value) ? null : value;
}

/**
 * The sum of a metric over all its labels; null if the metric is absent.
 * @param {readonly Sample[]} samples
 * @param {string} name
 */
export function total(samples, name) {
  const values = samples.filter((sample) => sample.name === name).map((sample) => sample.value);
  return values.length === 0 ? null : values.reduce((sum, value) => sum + value, 0);
}
