// The view of one answer: its text or tokens, its failure, its figures, and its buttons.

/** @import { Answer } from "../types.js" */

import { measures } from "./ask.js";
import { copyText } from "./clipboard.js";
import { icon, make } from "./elements.js";
import { canRetry, explain } from "./failures.js";
import { formatNumber, t } from "./i18n.js";
import { MarkdownView } from "./markdown.js";
import { spokenText } from "./spoken-text.js";
import { TokenView } from "./token-view.js";

/**
 * The announcement for screen readers.
 * @param {Answer} answer a finished one
 */
export function announcementOf(answer) {
  if (answer.failure !== null) return explain(answer.failure).sentence;
  if (answer.state === "stopped") return t("answerStopped", { name: nameOf(answer) });
  return t("answerFinished", { name: nameOf(answer), text: spokenText(answer.content) });
}

/** @typedef {{ regenerate: () => void, enterKey: () => void }} AnswerActions */

/** @param {Pick<Answer, "model" | "scale">} answer */
export function nameOf(answer) {
  if (answer.scale === null || answer.scale === 1) return answer.model;
  return t("scaled", { name: answer.model, scale: formatNumber(answer.scale) });
}

export class AnswerView {
  /**
   * @param {Answer} answer
   * @param {boolean} withTokens show tokens, if the answer has them
   * @param {AnswerActions} actions
   */
  constructor(answer, withTokens, actions) {
    this.answer = answer;
    this.withTokens = withTokens;
    this.actions = actions;
    this.text = make("div", { class: "markdown", dir: "auto" });
    this.markdown = new MarkdownView(this.text, t("copy"));
    /** @type {TokenView | null} */
    this.tokens = null;
    this.spoken = make("p", { class: "unseen", dir: "auto" });
    this.waiting = make("p", { class: "waiting" }, make("span", { class: "unseen" }, t("thinking")));
    this.reasoning = make("div", { class: "reasoning-text", dir: "auto" });
    this.fold = make("details", { class: "reasoning" }, make("summary", {}, t("reasoning")), this.reasoning);
    this.note = make("div", { class: "note" });
    this.numbers = make("span", { class: "numbers" });
    this.copy = this.#makeCopyButton();
    this.buttons = make("span", { class: "actions" }, this.copy, this.#makeRegenerateButton());
    const strip = make("footer", { class: "strip" }, this.numbers, this.buttons);
    this.element = make(
      "article",
      { class: "answer", "aria-label": nameOf(answer) },
      this.waiting,
      this.fold,
      this.text,
      this.note,
      strip,
    );
    this.update();
  }

  /** Show the current state of the answer. */
  update() {
    const { answer } = this;
    this.element.dataset["state"] = answer.state;
    this.element.setAttribute("aria-busy", String(answer.state === "streaming"));
    this.waiting.hidden = answer.state !== "streaming" || answer.content !== "" || answer.reasoning !== "";
    this.fold.hidden = answer.reasoning === "";
    if (this.reasoning.textContent !== answer.reasoning) this.reasoning.textContent = answer.reasoning;
    if (this.withTokens && answer.tokens.length > 0) this.#showTokens();
    else this.markdown.update(answer.content);
    this.#showNote();
    this.numbers.replaceChildren(...numbersOf(answer));
    this.copy.hidden = answer.content === "";
    this.buttons.hidden = answer.state === "streaming";
  }

  /**
   * Show that nothing has arrived for a while, until something does.
   * @param {number} seconds
   */
  showSilence(seconds) {
    this.note.textContent = t("silent", { seconds });
  }

  /** Show the tokens, and for screen readers the text before them, since tokens are read one by one. */
  #showTokens() {
    const { content, state, tokens } = this.answer;
    if (this.tokens === null) {
      this.tokens = new TokenView();
      this.text.replaceWith(this.spoken, this.tokens.element);
    }
    this.tokens.update(tokens);
    if (state !== "streaming") this.spoken.textContent = spokenText(content);
  }

  #makeCopyButton() {
    const copy = make(
      "button",
      { type: "button", class: "quiet small copy-answer", title: t("copyAnswer"), "aria-label": t("copyAnswer") },
      icon("copy"),
    );
    copy.addEventListener("click", () => void copyText(this.answer.content, copy));
    return copy;
  }

  #makeRegenerateButton() {
    return make(
      "button",
      {
        type: "button",
        class: "quiet small regenerate",
        title: t("regenerate"),
        "aria-label": t("regenerate"),
        click: () => this.actions.regenerate(),
      },
      icon("again"),
    );
  }

  #showNote() {
    const { content, failure, state, finishReason } = this.answer;
    this.note.className = failure === null ? "note" : "note failure";
    if (failure === null) {
      this.note.textContent = "";
      if (state === "stopped") this.note.textContent = t("stopped");
      else if (finishReason === "length") this.note.textContent = t("cutByLength");
      else if (state === "done" && content === "") this.note.textContent = t("emptyAnswer");
      return;
    }
    const { sentence, detail } = explain(failure);
    const retry = make(
      "button",
      { type: "button", class: "retry", click: () => this.actions.regenerate() },
      t("retry"),
    );
    const enterKey = make("button", { type: "button", click: () => this.actions.enterKey() }, t("openSettings"));
    const buttons = [...(failure.status === 401 ? [enterKey] : []), ...(canRetry(failure) ? [retry] : [])];
    this.note.replaceChildren(make("p", {}, sentence), make("p", { class: "detail" }, detail));
    if (buttons.length > 0) this.note.append(make("p", { class: "note-buttons" }, ...buttons));
  }
}

/** @param {Answer} answer */
function numbersOf(answer) {
  const found = measures(answer);
  const round = (/** @type {number} */ value, digits = 0) => formatNumber(value, { maximumFractionDigits: digits });
  const parts = [make("b", { class: "answer-name" }, nameOf(answer))];
  const add = (/** @type {string} */ name, /** @type {string} */ text) =>
    parts.push(make("span", { class: `number ${name}` }, text));
  if (found.tokensPerSecond !== null) add("rate", t("tokensPerSecond", { value: round(found.tokensPerSecond, 1) }));
  if (found.firstTokenMs !== null) add("first-token", t("firstToken", { value: round(found.firstTokenMs) }));
  if (found.completionTokens !== null) {
    const completion = `${found.isExact ? "" : "≥ "}${round(found.completionTokens)}`;
    const isFull = found.promptTokens !== null;
    add(
      "counts",
      isFull
        ? t("tokenCounts", { prompt: round(found.promptTokens ?? 0), completion })
        : t("tokenCount", { completion }),
    );
  }
  if (found.cachedTokens !== null) add("cached", t("cachedTokens", { value: round(found.cachedTokens) }));
  if (found.evictedTokens) add("evicted", t("evictedTokens", { value: round(found.evictedTokens) }));
  return parts;
}
