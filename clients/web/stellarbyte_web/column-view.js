// One column of the page: who answers, and its questions and answers. Knows no requests: it shows a column as it is.

/** @import { Answer, Column, ModelCard } from "../types.js" */

import { AnswerView } from "./answer-view.js";
import { icon, make } from "./elements.js";
import { t } from "./i18n.js";
import { ModelPicker } from "./model-picker.js";
import { QuestionView } from "./question-view.js";

const NEAR_END_PX = 60; // whoever has scrolled further up reads there, and is left alone

/**
 * What can be asked of the page by a column; `view` is the one that asks.
 * @typedef {object} ColumnEvents
 * @property {() => void} changed
 * @property {() => void} opened
 * @property {() => void} enterKey
 * @property {(view: ColumnView) => void} remove
 * @property {(view: ColumnView) => void} regenerate
 * @property {(view: ColumnView, text: string) => void} edited
 * @property {(text: string) => void} example
 */

export class ColumnView {
  /**
   * @param {Column} column
   * @param {ColumnEvents} events
   */
  constructor(column, events) {
    this.column = column;
    this.events = events;
    this.cards = /** @type {readonly ModelCard[]} */ ([]);
    this.withTokens = false;
    this.picker = this.#makePicker();
    this.head = make("div", { class: "column-head" });
    this.thread = make("div", { class: "thread", tabindex: "0", role: "group" });
    this.element = make("section", { class: "column" }, this.head, this.thread);
    /** @type {AnswerView | null} The answer that may still change. */
    this.last = null;
  }

  #makePicker() {
    const { changed, opened } = this.events;
    return new ModelPicker(this.column, { changed, opened });
  }

  /** @param {readonly ModelCard[]} cards */
  showCards(cards) {
    this.cards = cards;
    this.picker.showCards(cards);
  }

  /**
   * Show everything anew.
   * @param {{ number: number, isOnly: boolean, withTokens: boolean }} place
   */
  show({ number, isOnly, withTokens }) {
    this.withTokens = withTokens;
    this.element.setAttribute("aria-label", t("column", { number }));
    this.thread.setAttribute("aria-label", t("chat"));
    this.picker = this.#makePicker();
    this.picker.showCards(this.cards);
    const remove = make(
      "button",
      {
        type: "button",
        class: "quiet square remove",
        title: t("removeColumn"),
        "aria-label": t("removeColumn"),
        hidden: isOnly,
        click: () => this.events.remove(this),
      },
      icon("close"),
    );
    this.head.replaceChildren(this.picker.element, remove);
    this.showMessages(isOnly);
  }

  /** @param {boolean} isOnly */
  showMessages(isOnly) {
    this.last = null;
    const { messages } = this.column;
    if (messages.length === 0) {
      this.thread.replaceChildren(
        isOnly ? emptyState(this.events.example) : make("p", { class: "empty-column" }, t("emptyColumn")),
      );
      return;
    }
    const elements = messages.map((message) => {
      if (message.role === "user") return new QuestionView(message, (text) => this.events.edited(this, text)).element;
      this.last = new AnswerView(message, this.withTokens, {
        regenerate: () => this.events.regenerate(this),
        enterKey: this.events.enterKey,
      });
      return this.last.element;
    });
    this.thread.replaceChildren(...elements);
    this.thread.scrollTop = this.thread.scrollHeight;
  }

  /** @param {Answer} answer the last one, which has changed */
  update(answer) {
    if (this.last?.answer !== answer) return;
    const { thread } = this;
    const isAtEnd = thread.scrollHeight - thread.scrollTop - thread.clientHeight < NEAR_END_PX;
    this.last.update();
    if (isAtEnd) thread.scrollTop = thread.scrollHeight;
  }
}

/** @param {(text: string) => void} chosen */
function emptyState(chosen) {
  const examples = /** @type {const} */ (["example1", "example2", "example3", "example4"]).map((key) =>
    make("li", {}, make("button", { type: "button", class: "example", click: () => chosen(t(key)) }, t(key))),
  );
  return make(
    "div",
    { class: "empty" },
    make("img", { src: "web/favicon.svg", alt: "", width: "44", height: "44" }),
    make("h2", {}, t("emptyTitle")),
    make("p", {}, t("emptyText")),
    make("ul", { class: "examples", "aria-label": t("examples") }, ...examples),
  );
}
