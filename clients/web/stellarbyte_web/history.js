// Measurements of the last minutes: points of time and value, and a counter's rate.

/** @import { Point } from "../types.js" */

export const WINDOW_MS = 5 * 60 * 1000;
export const GAP_MS = 5000; // a longer time between points, as while the page is hidden, is shown as a gap

/** The recent points of one line; old ones are dropped. A value of null is a gap. */
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

/** The rate of a counter between two readings. */
export class Rate {
  constructor() {
    /** @type {{ timeMs: number, count: number } | null} */
    this.last = null;
  }

  /**
   * The rate per second since the last reading; null for the first one, after a gap, and after a reset of the counter.
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
