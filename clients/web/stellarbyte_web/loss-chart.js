// The chart of a job's losses by step, in SVG: a line for the training, and points for the validation.

import { make, makeSvg } from "./elements.js";
import { formatNumber, t } from "./i18n.js";

const WIDTH = 600;
const HEIGHT = 160;

/** @typedef {readonly [step: number, loss: number]} LossPoint */
/** @typedef {{ steps: number, train: readonly LossPoint[], valid: readonly LossPoint[] }} Losses by step, ascending */

const round = (/** @type {number} */ loss) =>
  formatNumber(loss, { maximumFractionDigits: 3, minimumFractionDigits: 3 });

export class LossChart {
  constructor() {
    /** @type {Losses} */
    this.losses = { steps: 1, train: [], valid: [] };
    this.train = makeSvg("path", { class: "line" });
    this.valid = makeSvg("path", { class: "line line-1" });
    this.dots = makeSvg("path", { class: "dots" });
    this.cursor = makeSvg("path", { class: "cursor" });
    this.svg = makeSvg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" },
      makeSvg("path", { class: "grid", d: `M0 ${HEIGHT}H${WIDTH}M0 ${HEIGHT / 2}H${WIDTH}M0 0H${WIDTH}` }),
      this.train,
      this.valid,
      this.dots,
      this.cursor,
    );
    this.ticks = make("div", { class: "loss-ticks", "aria-hidden": "true" });
    this.times = make("div", { class: "chart-times", "aria-hidden": "true" });
    this.readout = make("span", { class: "chart-readout" });
    this.legend = make("p", { class: "values loss-legend", "aria-hidden": "true" });
    this.plot = make(
      "div",
      {
        class: "chart loss-plot",
        role: "img",
        pointermove: (/** @type {PointerEvent} */ event) => this.#point(event.clientX),
        pointerleave: () => this.#point(null),
      },
      this.svg,
      this.times,
    );
    this.element = make("div", { class: "loss-chart" }, this.legend, this.ticks, this.plot);
  }

  /** @param {Losses} losses */
  draw(losses) {
    this.losses = losses;
    const { steps, train, valid } = losses;
    const top = topOf([...train, ...valid].map(([, loss]) => loss));
    this.train.setAttribute("d", lossPath(train, steps, top));
    this.valid.setAttribute("d", lossPath(valid, steps, top));
    this.dots.setAttribute("d", dotsPath(valid, steps, top));
    this.ticks.replaceChildren(...[top, top / 2, 0].map((loss) => make("span", {}, formatNumber(loss))));
    this.times.replaceChildren(make("span", {}, "0"), this.readout, make("span", {}, t("stepNumber", { step: steps })));
    const keys = [make("span", { class: "value value-0" }, t("trainLoss"))];
    if (valid.length > 0) keys.push(make("span", { class: "value value-1" }, t("validLoss")));
    this.legend.replaceChildren(...keys);
    this.plot.setAttribute("aria-label", describe(losses));
  }

  /** @param {number | null} clientX */
  #point(clientX) {
    if (clientX === null) {
      this.cursor.setAttribute("d", "");
      this.readout.textContent = "";
      return;
    }
    const { steps, train, valid } = this.losses;
    const place = this.svg.getBoundingClientRect();
    const step = Math.round(Math.min(1, Math.max(0, (clientX - place.left) / place.width)) * steps);
    this.cursor.setAttribute("d", `M${(WIDTH * step) / steps} 0V${HEIGHT}`);
    const of = (/** @type {readonly LossPoint[]} */ points) => points.find(([each]) => each === step)?.[1];
    const [trained, validated] = [of(train), of(valid)];
    const parts = [t("stepNumber", { step })];
    if (trained !== undefined) parts.push(`${t("trainLoss")} ${round(trained)}`);
    if (validated !== undefined) parts.push(`${t("validLoss")} ${round(validated)}`);
    this.readout.textContent = parts.join(" · ");
  }
}

/**
 * The losses as a sentence.
 * @param {Losses} losses
 */
export function describe({ train, valid }) {
  const [first, last] = [train[0], train[train.length - 1]];
  if (first === undefined || last === undefined) return t("lossNone");
  const values = { from: round(first[1]), to: round(last[1]), step: last[0] };
  const [before, after] = [valid[0], valid[valid.length - 1]];
  if (before === undefined || after === undefined || before === after) return t("lossOfTraining", values);
  return `${t("lossOfTraining", values)} ${t("lossOfValidation", { from: round(before[1]), to: round(after[1]) })}`;
}

/**
 * @param {readonly LossPoint[]} points
 * @param {number} steps
 * @param {number} top
 */
export function lossPath(points, steps, top) {
  return points.map((point, i) => `${i === 0 ? "M" : "L"}${placeOf(point, steps, top)}`).join("");
}

/**
 * @param {readonly LossPoint[]} points
 * @param {number} steps
 * @param {number} top
 */
function dotsPath(points, steps, top) {
  return points.map((point) => `M${placeOf(point, steps, top)}h0`).join("");
}

/**
 * @param {LossPoint} point
 * @param {number} steps
 * @param {number} top
 */
function placeOf([step, loss], steps, top) {
  const y = HEIGHT * (1 - Math.min(1, loss / top));
  return `${((WIDTH * step) / steps).toFixed(1)} ${y.toFixed(1)}`;
}

/**
 * The end of the scale: the next round number.
 * @param {readonly number[]} losses
 */
export function topOf(losses) {
  const most = Math.max(0.01, ...losses);
  const power = 10 ** Math.floor(Math.log10(most));
  return power * /** @type {number} */ ([1, 1.2, 1.6, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= most));
}
