// The view of one question, which can be edited in place.

/** @import { Question } from "../types.js" */
/** @import { Key } from "./i18n.js" */

import { icon, make } from "./elements.js";
import { t } from "./i18n.js";

export class QuestionView {
  /**
   * @param {Question} question
   * @param {(text: string) => Key | null} edited gets the new text; returns the reason if it cannot be asked
   */
  constructor(question, edited) {
    this.question = question;
    this.edited = edited;
    this.element = make("article", { class: "question", "aria-label": t("you") });
    this.isEditing = false;
    this.show();
  }

  /** Render the question again; an open draft stays. */
  show() {
    if (!this.isEditing) this.#showText();
  }

  #showText() {
    const edit = make(
      "button",
      {
        type: "button",
        class: "quiet small edit",
        title: t("edit"),
        "aria-label": t("editQuestion"),
        click: () => this.#showEditor(),
      },
      icon("pencil"),
    );
    this.element.replaceChildren(edit, make("div", { class: "bubble", dir: "auto" }, this.question.content));
  }

  #showEditor() {
    this.isEditing = true;
    const problem = make("p", { class: "problem", role: "alert" });
    const area = make("textarea", {
      "aria-label": t("editQuestion"),
      rows: "3",
      dir: "auto",
      input: () => (problem.textContent = ""),
    });
    area.value = this.question.content;
    const cancel = () => {
      this.isEditing = false;
      this.#showText();
      this.element.querySelector("button")?.focus();
    };
    const submit = () => {
      if (area.value.trim() === "") return;
      this.isEditing = false; // a sent question is shown as text
      const reason = this.edited(area.value.trim());
      if (reason === null) return;
      this.isEditing = true;
      problem.textContent = t(reason);
    };
    area.addEventListener("keydown", (event) => {
      if (event.isComposing || event.keyCode === 229) return; // 229: Safari's Enter that ends a composition
      if (event.key === "Escape") cancel();
      else if (event.key === "Enter" && !event.shiftKey) submit();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const buttons = make(
      "div",
      { class: "editor-buttons" },
      make("button", { type: "button", class: "quiet", click: cancel }, t("cancel")),
      make("button", { type: "button", class: "primary", click: submit }, t("saveAndSend")),
    );
    this.element.replaceChildren(make("div", { class: "editor" }, area, problem, buttons));
    area.focus();
    this.element.scrollIntoView({ block: "nearest" });
  }
}
