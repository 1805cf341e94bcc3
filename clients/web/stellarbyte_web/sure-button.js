// A button that acts when it is pressed twice. It forgets the first press when it loses the focus.

import { make } from "./elements.js";
import { t } from "./i18n.js";

export class SureButton {
  /**
   * @param {() => string} label in the current language
   * @param {() => void} act
   */
  constructor(label, act) {
    this.label = label;
    this.isAsked = false;
    this.element = make("button", {
      type: "button",
      click: (event) => {
        if (event.detail > 1) return; // the second half of a double click
        const isSure = this.isAsked;
        this.isAsked = !isSure;
        this.#draw();
        if (isSure) act();
      },
      blur: () => {
        this.isAsked = false;
        this.#draw();
      },
    });
  }

  /** @param {boolean} isThere */
  show(isThere) {
    this.element.hidden = !isThere;
    if (!isThere) this.isAsked = false;
    this.#draw();
  }

  #draw() {
    const text = this.isAsked ? `${this.label()} ${t("sure")}` : this.label();
    if (this.element.textContent !== text) this.element.textContent = text;
    this.element.classList.toggle("sure", this.isAsked);
  }
}
