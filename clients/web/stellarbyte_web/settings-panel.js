// The panel of settings: key, system prompt, sampling controls. They are kept until the tab is closed.

/** @import { SamplingField } from "../types.js" */

import { byId, make } from "./elements.js";
import { startKeyField } from "./frame.js";
import { t } from "./i18n.js";
import { FIELDS, readField, readSampling } from "./sampling.js";
import { session } from "./storage.js";

const LABELS = /** @type {const} */ ({ stop: "stopStrings" });
const CHOICES = /** @type {const} */ ({ error: "overflowError", slide: "overflowSlide" });
const WIDE = "(min-width: 64rem)"; // the panel has room next to the conversation

export class SettingsPanel {
  /** @param {() => void} keyChanged */
  constructor(keyChanged) {
    this.panel = byId("settings", HTMLElement);
    this.toggle = byId("settings-toggle", HTMLButtonElement);
    this.system = byId("system", HTMLTextAreaElement);
    const kept = readKept();
    /** @type {Record<string, string>} The texts of the sampling controls. */
    this.texts = kept.texts;
    this.system.value = kept.system;
    this.system.addEventListener("change", () => this.#keep());
    startKeyField("key", "key", keyChanged);
    this.toggle.addEventListener("click", () => this.#open(this.panel.hidden !== false));
    byId("settings-close", HTMLButtonElement).addEventListener("click", () => this.#open(false));
    byId("reset", HTMLButtonElement).addEventListener("click", () => {
      this.texts = {};
      this.#keep();
      this.showFields();
    });
    this.panel.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.isComposing) return;
      event.preventDefault();
      this.#open(false);
    });
    matchMedia(WIDE).addEventListener("change", () => {
      if (!this.panel.hidden) this.#open(false);
    });
    this.showFields();
    this.#setOpen(matchMedia(WIDE).matches && session.read("settings-open") === "yes");
  }

  /** The sampling parameters; null if a control is invalid, which is then marked. */
  sampling() {
    return readSampling(this.texts);
  }

  get systemPrompt() {
    return this.system.value;
  }

  /** Open the panel at the field for the key. */
  enterKey() {
    this.#open(true);
    byId("key", HTMLInputElement).focus();
  }

  /** Open the panel at the first invalid field. */
  showProblem() {
    this.#open(true);
    /** @type {HTMLElement | null} */ (this.panel.querySelector("[aria-invalid=true]"))?.focus();
  }

  /** Render the sampling controls again. */
  showFields() {
    byId("sampling", HTMLElement).replaceChildren(...FIELDS.map((field) => this.#makeField(field)));
  }

  /** @param {SamplingField} field */
  #makeField(field) {
    const id = `sampling-${field.name}`;
    const problem = make("p", { class: "problem", id: `${id}-problem`, role: "alert" });
    const input = makeInput(field, id);
    input.value = this.texts[field.name] ?? "";
    const check = () => {
      const read = readField(field, input.value);
      const found = "problem" in read ? read.problem : null;
      input.setAttribute("aria-invalid", String(found !== null));
      problem.textContent = found === null ? "" : t(found.key, found.values);
    };
    check();
    input.addEventListener("input", () => {
      this.texts[field.name] = input.value;
      check();
      this.#keep();
    });
    const label = make("label", { for: id }, t(field.name === "stop" ? LABELS.stop : field.name));
    const hint = field.kind === "lines" ? [make("p", { class: "hint" }, t("stopStringsHint"))] : [];
    return make("div", { class: `field ${field.kind}` }, label, input, problem, ...hint);
  }

  #keep() {
    session.write("settings", JSON.stringify({ system: this.system.value, texts: this.texts }));
  }

  /** @param {boolean} isOpen */
  #open(isOpen) {
    this.#setOpen(isOpen);
    session.write("settings-open", isOpen ? "yes" : "");
    if (!isOpen) this.toggle.focus();
    else if (!matchMedia(WIDE).matches) byId("settings-close", HTMLButtonElement).focus();
  }

  /** @param {boolean} isOpen */
  #setOpen(isOpen) {
    this.panel.hidden = !isOpen;
    this.toggle.setAttribute("aria-expanded", String(isOpen));
    byId("main", HTMLElement).inert = isOpen && !matchMedia(WIDE).matches; // if the panel covers it
  }
}

/**
 * @param {SamplingField} field
 * @param {string} id
 */
function makeInput(field, id) {
  const described = { id, "aria-describedby": `${id}-problem` };
  if (field.kind === "lines") return make("textarea", { ...described, rows: "2", spellcheck: "false" });
  if (field.kind !== "choice") {
    const mode = field.kind === "integer" ? "numeric" : "decimal";
    return make("input", { ...described, type: "text", inputmode: field.min < 0 ? "text" : mode, autocomplete: "off" });
  }
  const choices = field.choices.map((value) =>
    make("option", { value }, t(CHOICES[/** @type {"error" | "slide"} */ (value)])),
  );
  return make("select", described, make("option", { value: "" }, t("serverDefault")), ...choices);
}

/** @returns {{ system: string, texts: Record<string, string> }} */
function readKept() {
  try {
    return { system: "", texts: {}, ...JSON.parse(session.read("settings")) };
  } catch {
    return { system: "", texts: {} };
  }
}
