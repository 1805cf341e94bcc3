// The conversation of the page: requests the answers of all columns at once, and passes them to the columns.

/** @import { Answer, Column, ModelCard, Question } from "../types.js" */
/** @import { Server } from "./api.js" */
/** @import { Key } from "./i18n.js" */
/** @import { SettingsPanel } from "./settings-panel.js" */

import { fillAnswer } from "./ask.js";
import { ColumnView } from "./column-view.js";
import {
  MAX_COLUMNS,
  columnsFromText,
  columnsToText,
  isNoBetter,
  lastAnswer,
  lastQuestion,
  makeAnswer,
  makeColumn,
  requestBody,
} from "./conversation.js";
import { byId } from "./elements.js";
import { canRetry } from "./failures.js";
import { SilenceWatch } from "./silence.js";
import { session } from "./storage.js";

/**
 * @typedef {object} PlaygroundEvents
 * @property {() => void} changed the first answer has begun, or the last one ended
 * @property {() => void} asked the focused element may be gone
 * @property {() => void} removed a column is gone, and the focus with it
 * @property {(seconds: number) => void} silent an answer has received no data for this time
 * @property {(answer: Answer) => void} finished
 * @property {(answer: Answer) => void} restored the answer is empty, so the previous one is shown again
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
    /** @type {Map<ColumnView, AbortController>} Columns with an unfinished answer. */
    this.asking = new Map();
    const kept = columnsFromText(session.read("columns"));
    this.views = (kept.length > 0 ? kept : [makeColumn()]).map((column) => this.#makeView(column));
    addEventListener("pagehide", () => this.#keep());
  }

  get isOnly() {
    return this.views.length === 1;
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

  /**
   * Render everything again.
   * @param {ColumnView} lookedAt stays visible
   */
  show(lookedAt = this.#lookedAt) {
    const { isOnly, views, withTokens } = this;
    const columns = byId("columns", HTMLElement);
    const scrollTops = new Map(views.map((view) => [view, view.scrollTop])); // lost when elements move
    columns.dataset["count"] = String(views.length);
    columns.replaceChildren(...views.map((view) => view.element));
    views.forEach((view, i) => view.show({ number: i + 1, isOnly, withTokens }));
    // On a phone, where columns scroll together, the last one sets the position.
    for (const view of [...views, lookedAt]) view.scrollTo(scrollTops.get(view) ?? null);
    this.#showAsking();
  }

  /** The column with the largest visible part; the first of several. */
  get #lookedAt() {
    return this.views.reduce((most, view) => (view.visiblePx > most.visiblePx ? view : most));
  }

  /** @param {readonly ModelCard[]} cards the models and adapters served now */
  showModels(cards) {
    const isNew = JSON.stringify(cards) !== JSON.stringify(this.cards); // otherwise an open list stays unchanged
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

  /** Add a column, for the first adapter without one. */
  addColumn() {
    const taken = new Set(this.views.map((view) => view.column.model));
    const adapter = this.cards.find((card) => card.parent !== null && !taken.has(card.id));
    const view = this.#makeView(makeColumn(adapter?.id ?? this.cards[0]?.id ?? null));
    view.showCards(this.cards);
    this.views.push(view);
    this.#changed(view);
  }

  /** Clear the conversation; models and scales stay. */
  newChat() {
    this.stop();
    for (const view of this.views) view.column.messages = [];
    this.#changed();
  }

  /**
   * @param {string} question for all columns
   * @returns {boolean} false if the settings are invalid; the panel then shows the reason
   */
  ask(question) {
    return this.#askAll(this.views, ({ column }) => column.messages.push({ role: "user", content: question }));
  }

  /** Columns with a failed answer for which a retry may succeed. */
  get #failed() {
    return this.views.filter(({ column }) => {
      const failure = lastAnswer(column)?.failure ?? null;
      return failure !== null && canRetry(failure);
    });
  }

  get hasFailed() {
    return this.#failed.length > 0;
  }

  /** Retry the questions without an answer because of the connection. */
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
      edited: (view, question, text) => this.#edit(view, question, text),
      remove: (view) => {
        this.asking.get(view)?.abort();
        this.views = this.views.filter((other) => other !== view);
        this.#changed();
        this.events.removed();
      },
    });
  }

  /**
   * A question is in every column that was asked it, so it is edited in all of them.
   * @param {ColumnView} view
   * @param {Question} question
   * @param {string} text
   * @returns {Key | null} the reason if it cannot be asked; then nothing has changed
   */
  #edit(view, question, text) {
    if (this.cards.length === 0) return "failedUnavailable";
    if (lastQuestion(view.column) !== question) return "editNotLast";
    if (this.asking.has(view)) return "editWhileAnswering";
    const before = question.content;
    const views = this.views.filter(({ column }) => lastQuestion(column)?.content === before);
    const isAsked = this.#askAll(views, ({ column }) => {
      const last = lastQuestion(column);
      if (last !== null) last.content = text;
      if (lastAnswer(column) !== null) column.messages.pop(); // it answered another question
    });
    return isAsked ? null : "fixFields";
  }

  /**
   * Request answers to the last question of columns, except those with an unfinished answer. Replaces existing answers.
   * @param {ColumnView[]} views
   * @param {(view: ColumnView) => void} prepare changes the questions, if a request is possible
   * @returns {boolean} false if the settings are invalid, or the served models are not yet known
   */
  #askAll(views, prepare = () => undefined) {
    if (this.cards.length === 0) return false; // they determine whether to send a scale
    const sampling = this.settings.sampling();
    if (sampling === null) {
      this.settings.showProblem();
      return false;
    }
    const lookedAt = this.#lookedAt;
    const free = views.filter((view) => !this.asking.has(view));
    for (const view of free) {
      const { column, picker } = view;
      if (column.model === null) continue;
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
      view.showMessages(this.isOnly);
    }
    for (const view of free) view.scrollTo(null);
    const shown = free.includes(lookedAt) ? lookedAt : free[0];
    shown?.scrollTo(null); // on a phone, where columns scroll together, it sets the position
    this.#showAsking();
    this.events.asked();
    return true;
  }

  /**
   * @param {ColumnView} view
   * @param {Answer} answer
   * @param {import("../types.js").ChatBody} body
   * @param {Answer | null} before is shown again if the new answer is no better
   */
  async #fill(view, answer, body, before) {
    const abort = new AbortController();
    this.asking.set(view, abort);
    const silence = new SilenceWatch((seconds) => {
      view.update(answer, view === this.#lookedAt, seconds);
      this.events.silent(seconds);
    });
    let isDrawn = true;
    const changed = () => {
      silence.heard();
      if (!isDrawn) return;
      isDrawn = false;
      requestAnimationFrame(() => {
        isDrawn = true;
        view.update(answer, view === this.#lookedAt);
      });
    };
    try {
      await fillAnswer(this.server, body, answer, { signal: abort.signal, changed });
    } finally {
      silence.end();
      this.asking.delete(view);
      view.update(answer, view === this.#lookedAt); // also while the page is hidden and draws nothing
      if (before !== null && lastAnswer(view.column) === answer && isNoBetter(answer, before)) {
        const { scrollTop } = view;
        view.column.messages.splice(-1, 1, before);
        view.showMessages(this.isOnly);
        view.scrollTo(scrollTop);
        this.events.restored(answer);
      }
      this.#keep();
      this.#showAsking();
    }
    this.events.finished(answer);
  }

  /** @param {ColumnView} [lookedAt] */
  #changed(lookedAt) {
    this.#keep();
    this.show(lookedAt);
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
