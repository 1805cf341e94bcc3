// The controls of one column for the model or adapter, and the adapter's scale.

/** @import { Column, ModelCard } from "../types.js" */

import { MAX_SCALE } from "./conversation.js";
import { make } from "./elements.js";
import { formatNumber, t } from "./i18n.js";

const USUAL_SCALE = 2; // the slider's maximum, until a larger number is typed
const STEP = 0.05;

export class ModelPicker {
  /**
   * @param {Column} column its model and scale are changed
   * @param {{ opened: () => void, changed: () => void }} events `opened`: the list may be out of date
   */
  constructor(column, events) {
    this.column = column;
    this.select = make("select", { class: "model", "aria-label": t("model"), focus: events.opened });
    this.select.addEventListener("change", () => {
      column.model = this.select.value;
      this.#showScale();
      events.changed();
    });
    const bounds = { min: "0", step: String(STEP), "aria-label": t("scale"), title: t("scaleHint") };
    this.slider = make("input", { type: "range", class: "scale-slider", ...bounds });
    this.number = make("input", { type: "number", class: "scale-number", ...bounds, max: String(MAX_SCALE) });
    for (const input of [this.slider, this.number]) {
      input.addEventListener("input", () => this.#setScale(input));
      input.addEventListener("change", () => {
        this.#showScale();
        events.changed();
      });
    }
    this.scale = make(
      "span",
      { class: "scale" },
      make("span", { class: "scale-name", "aria-hidden": "true" }, t("scale")),
      this.slider,
      this.number,
    );
    this.element = make("div", { class: "picker" }, this.select, this.scale);
    /** @type {readonly ModelCard[]} */
    this.cards = [];
    this.showCards([]);
  }

  get isAdapter() {
    return this.cards.some((card) => card.id === this.column.model && card.parent !== null);
  }

  /** @param {readonly ModelCard[]} cards the models and adapters served now */
  showCards(cards) {
    this.cards = cards;
    const { column } = this;
    const option = (/** @type {ModelCard} */ { id }) => make("option", { value: id }, id);
    const models = cards.filter((card) => card.parent === null).map(option);
    const adapters = cards.filter((card) => card.parent !== null).map(option);
    const groups = [];
    if (models.length > 0) groups.push(make("optgroup", { label: t("modelGroup") }, ...models));
    if (adapters.length > 0) groups.push(make("optgroup", { label: t("adapterGroup") }, ...adapters));
    if (column.model === null) groups.push(make("option", { value: "" }, t("noModel")));
    else if (!cards.some((card) => card.id === column.model)) {
      groups.push(make("option", { value: column.model }, t("notServed", { name: column.model })));
    }
    this.select.replaceChildren(...groups);
    this.select.value = column.model ?? "";
    this.#showScale();
  }

  /** @param {HTMLInputElement} input */
  #setScale(input) {
    const scale = input.valueAsNumber;
    const isValid = scale >= 0 && scale <= MAX_SCALE;
    this.number.setAttribute("aria-invalid", String(!isValid));
    if (!isValid) return;
    this.column.scale = scale;
    if (input === this.slider) this.number.value = String(scale);
    else this.#showSlider();
  }

  #showScale() {
    this.scale.hidden = !this.isAdapter;
    this.number.value = String(this.column.scale);
    this.number.setAttribute("aria-invalid", "false");
    this.#showSlider();
  }

  #showSlider() {
    this.slider.max = String(this.column.scale > USUAL_SCALE ? MAX_SCALE : USUAL_SCALE);
    this.slider.value = String(this.column.scale);
    this.slider.setAttribute("aria-valuetext", formatNumber(this.column.scale));
  }
}
