// The view of one column: its model, questions and answers.

/** @import { Answer, Column, ModelCard, Question } from "../types.js" */
/** @import { Key } from "./i18n.js" */

import { AnswerView } from "./answer-view.js";
import { icon, make } from "./elements.js";
import { t } from "./i18n.js";
import { ModelPicker } from "./model-picker.js";
import { QuestionView } from "./question-view.js";
import { hideTokenCard } from "./token-view.js";

const NEAR_END_PX = 60; // further up, the column does not scroll with the answer

/**
 * Events of a column for the page; `view` is the column.
 * @typedef {object} ColumnEvents
 * @property {() => void} changed
 * @property {() => void} opened
 * @property {() => void} enterKey
 * @property {(view: ColumnView) => void} remove
 * @property {(view: ColumnView) => void} regenerate
 * @property {(view: ColumnView, question: Question, text: string) => Key | null} edited returns why not
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
    /** @type {WeakMap<Question, QuestionView>} Kept, because one may be in editing. */
    this.questions = new WeakMap();
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

  /** The scrolling element: on a phone, where columns are stacked, they scroll together. */
  get #scroller() {
    const isTogether = getComputedStyle(this.thread).overflowY === "visible";
    return isTogether ? (this.element.parentElement ?? this.thread) : this.thread;
  }

  /** The distance of the thread's end below the visible part; negative above. */
  get #beyondPx() {
    const scroller = this.#scroller;
    if (scroller === this.thread) return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
    return this.thread.getBoundingClientRect().bottom - scroller.getBoundingClientRect().bottom;
  }

  /** Whether the end is visible in the lower half, or just below it, because typing changes the frame's height. */
  get #isAtEnd() {
    const beyondPx = this.#beyondPx;
    return -this.#scroller.clientHeight / 2 < beyondPx && beyondPx < NEAR_END_PX;
  }

  /** The scroll position; null at the end. */
  get scrollTop() {
    return this.element.isConnected && !this.#isAtEnd ? this.#scroller.scrollTop : null;
  }

  /** @param {number | null} top null: the end of the thread, or the start of the examples */
  scrollTo(top) {
    const scroller = this.#scroller;
    if (top !== null) scroller.scrollTop = top;
    else if (scroller === this.thread && this.column.messages.length === 0) scroller.scrollTop = 0;
    else scroller.scrollTop += this.#beyondPx;
  }

  /** The visible part of the column's height; negative if none is visible. */
  get visiblePx() {
    const frame = (this.element.parentElement ?? this.element).getBoundingClientRect();
    const { top, bottom } = this.element.getBoundingClientRect();
    return Math.min(bottom, frame.bottom) - Math.max(top, frame.top);
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
    hideTokenCard();
    const { messages } = this.column;
    if (messages.length === 0) {
      this.thread.replaceChildren(
        isOnly ? emptyState(this.events.example) : make("p", { class: "empty-column" }, t("emptyColumn")),
      );
      return;
    }
    const elements = messages.map((message) => {
      if (message.role === "user") return this.#questionView(message).element;
      this.last = new AnswerView(message, this.withTokens, {
        regenerate: () => this.events.regenerate(this),
        enterKey: this.events.enterKey,
      });
      return this.last.element;
    });
    this.thread.replaceChildren(...elements);
  }

  /** @param {Question} question */
  #questionView(question) {
    const edited = (/** @type {string} */ text) => this.events.edited(this, question, text);
    const view = this.questions.get(question) ?? new QuestionView(question, edited);
    this.questions.set(question, view);
    view.show();
    return view;
  }

  /**
   * Show a change of the last answer. A visible end stays visible; if columns scroll together, that of the column in
   * view.
   * @param {Answer} answer
   * @param {boolean} isLookedAt
   * @param {number | null} silentS seconds since the last data
   */
  update(answer, isLookedAt, silentS = null) {
    if (this.last?.answer !== answer) return;
    const isFollowed = this.#isAtEnd && (isLookedAt || this.#scroller === this.thread);
    this.last.update();
    if (silentS !== null) this.last.showSilence(silentS);
    if (isFollowed && this.#beyondPx > 0) this.scrollTo(null);
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
