// The conversation of the page: asks the server for every column at once, and lets the columns show what comes.

/** @import { Answer, Column, ModelCard } from "../types.js" */
/** @import { Server } from "./api.js" */
/** @import { SettingsPanel } from "./settings-panel.js" */

import { nameOf } from "./answer-view.js";
import { fillAnswer } from "./ask.js";
import { ColumnView } from "./column-view.js";
import {
  MAX_COLUMNS,
  columnsFromText,
  columnsToText,
  lastAnswer,
  lastQuestion,
  makeAnswer,
  makeColumn,
  requestBody,
} from "./conversation.js";
import { byId } from "./elements.js";
import { explain } from "./failures.js";
import { t } from "./i18n.js";
import { session } from "./storage.js";

/**
 * @typedef {object} PlaygroundEvents
 * @property {() => void} changed something is asked, or nothing any more
 * @property {() => void} asked what had the focus may be gone
 * @property {() => void} removed a column is gone, and the focus with it
 * @property {(answer: Answer, spoken: string) => void} finished `spoken` is its text for ears
 * @property {(answer: Answer) => void} restored the answer failed, and the one before it is shown again
 * @property {(text: string) => void} example
 * @property {() => void} modelsWanted
 * @property {() => void} notKept
 */

export class Playground {
  /**
   * @param {Server} server
   * @param {SettingsPanel} settings
   * @param {PlaygroundEvents} events
   */
  constructor(server, settings, events) {
    this.server = server;
    this.settings = settings;
    this.events = events;
    this.withTokens = session.read("probabilities") === "yes";
    /** @type {readonly ModelCard[]} */
    this.cards = [];
    /** @type {Map<ColumnView, AbortController>} Columns whose answer is on its way. */
    this.asking = new Map();
    const kept = columnsFromText(session.read("columns"));
    this.views = (kept.length > 0 ? kept : [makeColumn()]).map((column) => this.#makeView(column));
    addEventListener("pagehide", () => this.#keep());
  }

  get isAsking() {
    return this.asking.size > 0;
  }

  get canAsk() {
    return this.cards.length > 0 && !this.isAsking;
  }

  get canCompare() {
    return this.views.length < MAX_COLUMNS && this.cards.length > 0;
  }

  /** Show everything anew. */
  show() {
    const isOnly = this.views.length === 1;
    const columns = byId("columns", HTMLElement);
    const scrollTops = this.views.map((view) => view.scrollTop); // lost when elements move
    columns.dataset["count"] = String(this.views.length);
    columns.replaceChildren(...this.views.map((view) => view.element));
    const { withTokens } = this;
    this.views.forEach((view, i) => view.show({ number: i + 1, isOnly, withTokens, scrollTop: scrollTops[i] ?? null }));
    this.#showAsking();
  }

  /** @param {readonly ModelCard[]} cards what the server has now */
  showModels(cards) {
    const isNew = JSON.stringify(cards) !== JSON.stringify(this.cards); // else a list that is open stays as it is
    this.cards = cards;
    for (const view of isNew ? this.views : []) {
      view.column.model ??= cards[0]?.id ?? null;
      view.showCards(cards);
    }
    this.events.changed();
  }

  /** @param {boolean} isOn */
  showProbabilities(isOn) {
    this.withTokens = isOn;
    session.write("probabilities", isOn ? "yes" : "");
    this.show();
  }

  /** Another column, for the first adapter that no column has yet. */
  addColumn() {
    const taken = new Set(this.views.map((view) => view.column.model));
    const adapter = this.cards.find((card) => card.parent !== null && !taken.has(card.id));
    const view = this.#makeView(makeColumn(adapter?.id ?? this.cards[0]?.id ?? null));
    view.showCards(this.cards);
    this.views.push(view);
    this.#changed();
  }

  /** Forget what was said; models and scales stay. */
  newChat() {
    this.stop();
    for (const view of this.views) view.column.messages = [];
    this.#changed();
  }

  /**
   * @param {string} question for all columns
   * @returns {boolean} false if the settings do not allow it, where the panel then shows why
   */
  ask(question) {
    return this.#askAll(this.views, ({ column }) => column.messages.push({ role: "user", content: question }));
  }

  /** Columns without an answer that another try may give; what was refused as wrong stays wrong. */
  get #failed() {
    return this.views.filter(({ column }) => {
      const answer = lastAnswer(column);
      return answer?.state === "failed" && answer.failure?.status !== 400;
    });
  }

  get hasFailed() {
    return this.#failed.length > 0;
  }

  /** Ask again whatever got no answer because of the connection. */
  retryFailed() {
    this.#askAll(this.#failed);
  }

  stop() {
    for (const abort of this.asking.values()) abort.abort();
  }

  /** @param {Column} column */
  #makeView(column) {
    return new ColumnView(column, {
      changed: () => this.#keep(),
      opened: () => this.events.modelsWanted(),
      enterKey: () => this.settings.enterKey(),
      example: (text) => this.events.example(text),
      regenerate: (view) => this.#askAll([view]),
      edited: (view, text) => this.#edit(view, text),
      remove: (view) => {
        this.asking.get(view)?.abort();
        this.views = this.views.filter((other) => other !== view);
        this.#changed();
        this.events.removed();
      },
    });
  }

  /**
   * One question stands in every column that was asked it, so it is edited in all of them.
   * @param {ColumnView} view
   * @param {string} text
   */
  #edit(view, text) {
    if (this.asking.has(view)) return;
    const before = lastQuestion(view.column);
    const views = this.views.filter(({ column }) => lastQuestion(column) === before);
    this.#askAll(views, ({ column }) => {
      const question = column.messages.findLast((message) => message.role === "user");
      if (question !== undefined) question.content = text;
      if (lastAnswer(column) !== null) column.messages.pop(); // it was to another question
    });
  }

  /**
   * Let columns answer their last question, but those that are at it. An answer that they have to it goes.
   * @param {ColumnView[]} views
   * @param {(view: ColumnView) => void} prepare changes what is asked, if anything can be asked
   * @returns {boolean} false if the settings do not allow it, or what is served is not known yet
   */
  #askAll(views, prepare = () => undefined) {
    if (this.cards.length === 0) return false; // whether a scale is to be sent depends on it
    const sampling = this.settings.sampling();
    if (sampling === null) {
      this.settings.showProblem();
      return false;
    }
    for (const view of views) {
      const { column, picker } = view;
      if (column.model === null || this.asking.has(view)) continue;
      prepare(view);
      if (lastQuestion(column) === null) continue;
      const before = lastAnswer(column);
      if (before !== null) column.messages.pop();
      const { isAdapter } = picker;
      const answer = makeAnswer(column.model, isAdapter ? column.scale : null);
      column.messages.push(answer);
      const body = requestBody(column, {
        system: this.settings.systemPrompt,
        sampling,
        withLogprobs: this.withTokens,
        isAdapter,
      });
      void this.#fill(view, answer, body, before);
      view.showMessages(this.views.length === 1);
    }
    this.#showAsking();
    this.events.asked();
    return true;
  }

  /**
   * @param {ColumnView} view
   * @param {Answer} answer
   * @param {import("../types.js").ChatBody} body
   * @param {Answer | null} before is shown again if nothing better comes
   */
  async #fill(view, answer, body, before) {
    const abort = new AbortController();
    this.asking.set(view, abort);
    let isDrawn = true;
    const changed = () => {
      if (!isDrawn) return;
      isDrawn = false;
      requestAnimationFrame(() => {
        isDrawn = true;
        view.update(answer);
      });
    };
    try {
      await fillAnswer(this.server, body, answer, { signal: abort.signal, changed });
    } finally {
      this.asking.delete(view);
      view.update(answer); // also while the page is hidden, where nothing is drawn
      if (before !== null && this.#isNoBetter(view, answer, before)) {
        view.column.messages.splice(-1, 1, before);
        view.showMessages(this.views.length === 1);
        this.events.restored(answer);
      }
      this.#keep();
      this.#showAsking();
    }
    this.events.finished(answer, view.last?.spoken ?? "");
  }

  /**
   * @param {ColumnView} view
   * @param {Answer} answer
   * @param {Answer} before
   */
  #isNoBetter({ column }, answer, before) {
    const isEmpty = answer.state === "failed" && answer.content === "";
    return isEmpty && before.state !== "failed" && lastAnswer(column) === answer;
  }

  #changed() {
    this.#keep();
    this.show();
  }

  #showAsking() {
    byId("columns", HTMLElement).classList.toggle("asking", this.isAsking);
    this.events.changed();
  }

  #keep() {
    const isKept = session.write("columns", columnsToText(this.views.map((view) => view.column)));
    if (!isKept) this.events.notKept();
  }
}

/**
 * @param {Answer} answer
 * @param {string} text of it, for ears
 */
export function announcementOf(answer, text) {
  if (answer.failure !== null) return explain(answer.failure).sentence;
  if (answer.state === "stopped") return t("answerStopped", { name: nameOf(answer) });
  return t("answerFinished", { name: nameOf(answer), text });
}
