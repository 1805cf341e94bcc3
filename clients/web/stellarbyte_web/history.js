// What was measured in the last minutes: points of time and value, and a counter's rate. Knows no page and no clock.

/** @import { Point } from "../types.js" */

export const WINDOW_MS = 5 * 60 * 1000;
export const GAP_MS = 5000; // longer without a point, as while the page is hidden, and nothing is known between

/** Points of one line, of which those that are too old are forgotten. A value of null is a gap. */
export class History {
  constructor() {
    /** @type {Point[]} */
    this.points = [];
  }

  /**
   * @param {number} timeMs
   * @param {number | null} value
   */
  add(timeMs, value) {
    this.points.push({ timeMs, value });
    const start = this.points.findIndex((point) => point.timeMs >= timeMs - WINDOW_MS);
    this.points.splice(0, start);
  }

  get max() {
    return this.points.reduce((max, { value }) => Math.max(max, value ?? 0), 0);
  }
}

/** How fast a counter grows, from one reading to the next. */
export class Rate {
  constructor() {
    /** @type {{ timeMs: number, count: number } | null} */
    this.last = null;
  }

  /**
   * Per second since the last reading; null for the first one, after a gap, and after the counter began anew.
   * @param {number} timeMs
   * @param {number | null} count
   */
  read(timeMs, count) {
    const { last } = this;
    this.last = count === null ? null : { timeMs, count };
    if (last === null || count === null || count < last.count || timeMs <= last.timeMs) return null;
    if (timeMs - last.timeMs > GAP_MS) return null;
    return ((count - last.count) * 1000) / (timeMs - last.timeMs);
  }
}
