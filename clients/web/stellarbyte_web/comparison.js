// One question side by side: answered by the model alone, by the new adapter, and by a third model.

/** @import { Answer, ModelCard } from "../types.js" */
/** @import { Server } from "./api.js" */

import { announcementOf, AnswerView } from "./answer-view.js";
import { fillAnswer } from "./ask.js";
import { makeAnswer } from "./conversation.js";
import { byId, make } from "./elements.js";
import { t } from "./i18n.js";

const MAX_TOKENS = 300;

/** @typedef {{ answer: Answer, view: AnswerView }} Shown */

export class Comparison {
  /** @param {Server} server */
  constructor(server) {
    this.server = server;
    this.section = byId("comparison", HTMLElement);
    this.prompt = byId("prompt", HTMLTextAreaElement);
    this.other = byId("other", HTMLSelectElement);
    this.ask = byId("ask", HTMLButtonElement);
    this.stop = byId("stop", HTMLButtonElement);
    this.tuned = "";
    /** @type {readonly ModelCard[]} */
    this.cards = [];
    /** @type {Shown[]} */
    this.shown = [];
    this.question = "";
    this.asking = new AbortController();
    byId("compare-form", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#askAll();
    });
    this.stop.addEventListener("click", () => this.asking.abort());
  }

  /**
   * @param {string | null} tuned the new model; null: there is none
   * @param {readonly ModelCard[]} cards the models served now
   * @param {string | null} before the version before it
   */
  show(tuned, cards, before) {
    this.section.hidden = tuned === null || !cards.some(({ id }) => id === tuned);
    if (tuned === null) return;
    const isOther = tuned !== this.tuned;
    if (isOther) this.#clear();
    const isSame = !isOther && JSON.stringify(cards) === JSON.stringify(this.cards);
    this.tuned = tuned;
    this.cards = cards;
    if (!isSame) this.#showChoices(isOther ? (before ?? "") : this.other.value);
  }

  /** Show everything again, in the current language. */
  translate() {
    this.#showChoices(this.other.value);
    this.shown = this.shown.map(({ answer }) => ({ answer, view: this.#view(answer) }));
    this.#showAnswers();
  }

  /** @param {string} chosen */
  #showChoices(chosen) {
    const others = this.cards.filter(({ id, parent }) => parent !== null && id !== this.tuned).map(({ id }) => id);
    const options = others.map((id) => make("option", { value: id }, id));
    this.other.replaceChildren(make("option", { value: "" }, t("noOther")), ...options);
    this.other.value = others.includes(chosen) ? chosen : "";
  }

  #clear() {
    this.asking.abort();
    this.shown = [];
    this.#showAnswers();
  }

  async #askAll() {
    const question = this.prompt.value.trim();
    const base = this.cards.find(({ parent }) => parent === null)?.id;
    if (question === "" || base === undefined || !this.stop.hidden) return;
    this.asking.abort();
    this.asking = new AbortController();
    this.question = question;
    const { signal } = this.asking;
    const models = [base, this.tuned, ...(this.other.value === "" ? [] : [this.other.value])];
    this.shown = models.map((model) => {
      const answer = makeAnswer(model, null);
      return { answer, view: this.#view(answer) };
    });
    this.#showAnswers();
    this.#showAsking(true);
    await Promise.all(this.shown.map(({ answer }) => this.#fill(answer, signal)));
    if (this.asking.signal === signal) this.#showAsking(false);
  }

  /** @param {boolean} isAsking */
  #showAsking(isAsking) {
    const focused = document.activeElement;
    this.ask.hidden = isAsking;
    this.stop.hidden = !isAsking;
    if (focused === this.ask) this.stop.focus();
    if (focused === this.stop) this.ask.focus();
  }

  /**
   * @param {Answer} answer
   * @param {AbortSignal} signal
   */
  async #fill(answer, signal) {
    let isDrawn = true;
    const update = () => this.shown.find((each) => each.answer === answer)?.view.update();
    const changed = () => {
      if (!isDrawn) return;
      isDrawn = false;
      requestAnimationFrame(() => {
        isDrawn = true;
        update();
      });
    };
    const body = {
      model: answer.model,
      messages: [{ role: /** @type {const} */ ("user"), content: this.question }],
      temperature: 0, // so that a difference is the adapter's
      max_tokens: MAX_TOKENS,
      stream_options: { include_usage: /** @type {const} */ (true) },
    };
    await fillAnswer(this.server, body, answer, { signal, changed });
    update(); // also while the page is hidden and draws nothing
    byId("announcer", HTMLElement).textContent = announcementOf(answer);
  }

  /** @param {Answer} answer */
  #view(answer) {
    const enterKey = () => byId("key", HTMLInputElement).focus();
    return new AnswerView(answer, false, { regenerate: () => void this.#askAll(), enterKey });
  }

  #showAnswers() {
    const [, tuned] = this.shown;
    const columns = this.shown.map((each, index) => {
      const title = t(index === 0 ? "columnBase" : each === tuned ? "columnNew" : "columnOther");
      return make("section", { class: "answer-column" }, make("h3", {}, title), each.view.element);
    });
    const answers = byId("answers", HTMLElement);
    answers.dataset["count"] = String(columns.length);
    answers.replaceChildren(...columns);
  }
}
