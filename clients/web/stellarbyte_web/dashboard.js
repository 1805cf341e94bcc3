// The charts of the status page, updated with each scrape of the server's metrics.

/** @import { Sample } from "../types.js" */

import { Chart } from "./chart.js";
import { make } from "./elements.js";
import { History, Rate } from "./history.js";
import { formatNumber, t } from "./i18n.js";
import { total } from "./prometheus.js";

const whole = (/** @type {number} */ value) => formatNumber(value, { maximumFractionDigits: value < 10 ? 1 : 0 });
const percent = (/** @type {number} */ value) =>
  formatNumber(value, { style: "percent", maximumFractionDigits: value < 0.1 ? 1 : 0 });

export class Dashboard {
  constructor() {
    this.running = new History();
    this.waiting = new History();
    this.cache = new History();
    this.tokens = new History();
    this.tokenRate = new Rate();
    this.cards = [
      new Card("generated", [{ key: "perSecond", history: this.tokens }], { format: whole }),
      new Card(
        "requests",
        [
          { key: "running", history: this.running },
          { key: "waiting", history: this.waiting },
        ],
        { format: whole },
      ),
      new Card("cacheUse", [{ key: null, history: this.cache }], { format: percent, most: 1 }),
    ];
  }

  get elements() {
    return this.cards.map((card) => card.element);
  }

  /**
   * @param {number} nowMs
   * @param {readonly Sample[] | null} samples null if the server did not answer
   */
  add(nowMs, samples) {
    const read = (/** @type {string} */ name) => (samples === null ? null : total(samples, name));
    this.running.add(nowMs, read("vllm:num_requests_running"));
    this.waiting.add(nowMs, read("vllm:num_requests_waiting"));
    this.cache.add(nowMs, read("vllm:kv_cache_usage_perc"));
    this.tokens.add(nowMs, this.tokenRate.read(nowMs, read("vllm:generation_tokens_total")));
    this.draw(nowMs);
  }

  /** @param {number} nowMs */
  draw(nowMs) {
    for (const card of this.cards) card.draw(nowMs);
  }
}

/** A chart with its title and its latest values. */
class Card {
  /**
   * @param {import("./i18n.js").Key} title
   * @param {{ key: import("./i18n.js").Key | null, history: History }[]} lines without a key, only the value is shown
   * @param {{ format: (value: number) => string, most?: number }} options
   */
  constructor(title, lines, options) {
    this.title = title;
    this.lines = lines;
    this.format = options.format;
    const nameOf = (/** @type {(typeof lines)[number]} */ line) => (line.key === null ? "" : t(line.key));
    this.chart = new Chart(
      lines.map((line) => ({ name: () => nameOf(line), points: () => line.history.points })),
      options,
    );
    this.heading = make("h2");
    this.values = make("p", { class: "values" });
    this.element = make("section", { class: "card chart-card" }, this.heading, this.values, this.chart.element);
  }

  /** @param {number} nowMs */
  draw(nowMs) {
    this.heading.textContent = t(this.title);
    const values = this.lines.map(({ key, history }, i) => {
      const value = history.points[history.points.length - 1]?.value ?? null;
      const shown = make("b", {}, value === null ? "–" : this.format(value));
      return make("span", { class: `value value-${i}` }, shown, key === null ? "" : ` ${t(key)}`);
    });
    this.values.replaceChildren(...values);
    this.chart.draw(nowMs);
    const max = Math.max(...this.lines.map(({ history }) => history.max));
    const label = t("chartLabel", {
      title: t(this.title),
      value: this.values.textContent ?? "",
      max: this.format(max),
    });
    this.chart.element.setAttribute("role", "img");
    this.chart.element.setAttribute("aria-label", label);
  }
}
