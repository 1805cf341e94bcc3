// A small chart of the last minutes: lines over time in SVG, with the value under the pointer.

/** @import { Point } from "../types.js" */

import { make, makeSvg } from "./elements.js";
import { GAP_MS, WINDOW_MS } from "./history.js";
import { t } from "./i18n.js";

const WIDTH = 300;
const HEIGHT = 90;

/**
 * @typedef {object} Line
 * @property {() => string} name
 * @property {() => readonly Point[]} points
 */

export class Chart {
  /**
   * @param {Line[]} lines one to three
   * @param {{ format: (value: number) => string, most?: number }} options `most`: the end of a fixed scale
   */
  constructor(lines, options) {
    this.lines = lines;
    this.options = options;
    this.paths = lines.map((_, i) => makeSvg("path", { class: `line line-${i}` }));
    this.cursor = makeSvg("path", { class: "cursor" });
    this.svg = makeSvg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" },
      makeSvg("path", { class: "grid", d: `M0 ${HEIGHT}H${WIDTH}M0 ${HEIGHT / 2}H${WIDTH}M0 0H${WIDTH}` }),
      ...this.paths,
      this.cursor,
    );
    this.top = make("span", { class: "chart-top" });
    this.readout = make("span", { class: "chart-readout" });
    this.start = make("span");
    this.end = make("span");
    this.element = make(
      "div",
      {
        class: "chart",
        pointermove: (/** @type {PointerEvent} */ event) => this.#point(event.clientX),
        pointerleave: () => this.#point(null),
      },
      this.top,
      this.svg,
      make("div", { class: "chart-times" }, this.start, this.readout, this.end),
    );
    /** @type {number | null} The pointer's position, as a fraction of the width. */
    this.pointed = null;
    this.nowMs = 0;
  }

  /** @param {number} nowMs the right end */
  draw(nowMs) {
    this.nowMs = nowMs;
    const most =
      this.options.most ??
      roundUp(Math.max(...this.lines.flatMap((line) => line.points().map(({ value }) => value ?? 0)), 1));
    this.lines.forEach((line, i) => this.paths[i]?.setAttribute("d", pathOf(line.points(), nowMs, most)));
    this.top.textContent = this.options.format(most);
    this.start.textContent = t("minutesAgo");
    this.end.textContent = t("now");
    this.#showPointed();
  }

  /** @param {number | null} clientX */
  #point(clientX) {
    const place = this.svg.getBoundingClientRect();
    this.pointed = clientX === null ? null : Math.min(1, Math.max(0, (clientX - place.left) / place.width));
    this.#showPointed();
  }

  #showPointed() {
    this.cursor.setAttribute("d", this.pointed === null ? "" : `M${this.pointed * WIDTH} 0V${HEIGHT}`);
    const timeMs = this.nowMs - (1 - (this.pointed ?? 1)) * WINDOW_MS;
    const values = this.lines.flatMap((line) => {
      const point = nearest(line.points(), timeMs);
      return point === null ? [] : [`${this.options.format(point)} ${line.name()}`];
    });
    this.readout.textContent = this.pointed === null ? "" : values.join(" · ");
  }
}

/**
 * @param {readonly Point[]} points
 * @param {number} nowMs
 * @param {number} most
 */
export function pathOf(points, nowMs, most) {
  let path = "";
  /** @type {Point | null} */
  let before = null;
  for (const point of points) {
    if (point.value === null) {
      before = null;
      continue;
    }
    const x = WIDTH * (1 - (nowMs - point.timeMs) / WINDOW_MS);
    const y = HEIGHT * (1 - Math.min(1, point.value / most));
    const isJoined = before !== null && point.timeMs - before.timeMs <= GAP_MS;
    path += `${isJoined ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    before = point;
  }
  return path;
}

/**
 * @param {readonly Point[]} points
 * @param {number} timeMs
 */
function nearest(points, timeMs) {
  let best = null;
  for (const point of points) {
    if (best === null || Math.abs(point.timeMs - timeMs) <= Math.abs(best.timeMs - timeMs)) best = point;
  }
  return best === null || Math.abs(best.timeMs - timeMs) > GAP_MS ? null : best.value;
}

/**
 * The next of 1, 2, 5, 10, 20, 50 …
 * @param {number} value above 0
 */
export function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * /** @type {number} */ ([1, 2, 5, 10].find((step) => step * power >= value));
}
