// The form with the examples: reads them while they are typed, has the server check them, and starts a job.

/** @import { CheckBody, CheckedFiles, Example, Examples, ExampleFormat, TuningJob } from "../types.js" */
/** @import { Server } from "./api.js" */

import { failureOf } from "./api.js";
import { byId, make } from "./elements.js";
import { divide, jsonLines, readExamples } from "./examples.js";
import { explain } from "./failures.js";
import { readNumber } from "./form-fields.js";
import { formatBytes, formatNumber, t } from "./i18n.js";
import { canEvaluate, keepSettings, readSettings } from "./job-settings.js";
import { session } from "./storage.js";

const SHOWN_EXAMPLES = 50;
const SHOWN_PROBLEMS = 10;
const READ_MS = 150; // after the last change, as long texts take a moment
const MAX_EPOCHS = 50;
const MAX_HELD_PERCENT = 50;
const FORMATS = /** @type {const} */ ({
  jsonl: "formatJsonl",
  pairs: "formatPairs",
  csv: "formatCsv",
  tsv: "formatTsv",
});

/** @typedef {{ training: Example[], validation: Example[] }} Divided */
/**
 * @typedef {object} Uploaded examples that are on the server
 * @property {string} about what they were made of
 * @property {Divided} examples
 * @property {CheckBody} body of the check and of the job
 * @property {CheckedFiles | null} checked null: not yet
 */

export class ExamplesForm {
  /**
   * @param {Server} server
   * @param {(job: TuningJob) => void} started
   * @param {() => string | null} model the served one's name; null: not yet known
   */
  constructor(server, started, model) {
    this.server = server;
    this.started = started;
    this.model = model;
    this.text = byId("examples", HTMLTextAreaElement);
    this.format = byId("format", HTMLSelectElement);
    this.filename = "";
    /** @type {Examples} */
    this.read = { format: "pairs", examples: [], problems: [] };
    /** @type {Uploaded | null} */
    this.uploaded = null;
    /** @type {(() => void) | null} Shows the outcome of the last check again. */
    this.outcome = null;
    this.isBusy = false;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.timer = undefined;
    this.#restore();
    this.#listen();
    this.#readText();
  }

  /** Show everything again, in the current language. */
  show() {
    this.#showRead();
    this.outcome?.();
  }

  #restore() {
    if (this.text.value === "") {
      // not what was written before this script was there
      this.text.value = session.read("tune-examples");
      this.filename = session.read("tune-filename");
      this.format.value = session.read("tune-format") || "auto";
    }
    keepSettings();
    addEventListener("pagehide", () => {
      session.write("tune-examples", this.text.value);
      session.write("tune-filename", this.filename);
      session.write("tune-format", this.format.value);
    });
  }

  #listen() {
    this.text.addEventListener("input", () => {
      this.filename = "";
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.#readText(), READ_MS);
    });
    this.format.addEventListener("change", () => this.#readText());
    const file = byId("file", HTMLInputElement);
    byId("open", HTMLButtonElement).addEventListener("click", () => file.click());
    file.addEventListener("change", () => {
      void this.#open(file.files?.[0]);
      file.value = ""; // the same file can be opened again
    });
    const drop = byId("drop", HTMLElement);
    drop.addEventListener("dragover", (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return; // a text drops into the field by itself
      event.preventDefault();
      drop.classList.add("dropping");
    });
    drop.addEventListener("dragleave", () => drop.classList.remove("dropping"));
    drop.addEventListener("drop", (event) => {
      drop.classList.remove("dropping");
      const dropped = event.dataTransfer?.files[0];
      if (dropped === undefined) return;
      event.preventDefault();
      void this.#open(dropped);
    });
    byId("check", HTMLButtonElement).addEventListener("click", () => void this.#act(() => this.#check()));
    byId("tune", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#act(() => this.#start());
    });
  }

  /** @param {File | undefined} file */
  async #open(file) {
    if (file === undefined) return;
    this.text.value = await file.text();
    this.filename = file.name;
    this.#readText();
  }

  #readText() {
    clearTimeout(this.timer);
    const format = /** @type {ExampleFormat | "auto"} */ (this.format.value);
    this.read = readExamples(this.text.value, format, this.filename);
    this.outcome = null;
    byId("check-result", HTMLElement).replaceChildren();
    this.#showRead();
  }

  #showRead() {
    const { examples, problems, format } = this.read;
    const isEmpty = examples.length === 0 && problems.length === 0;
    const summary = t("examplesRead", { count: formatNumber(examples.length), format: t(FORMATS[format]) });
    byId("read-summary", HTMLElement).textContent = isEmpty ? t("examplesNone") : summary;
    const shown = examples.slice(0, SHOWN_EXAMPLES).map(chatView);
    const more = examples.length - shown.length;
    if (more > 0) shown.push(make("p", { class: "hint" }, t("examplesMore", { count: formatNumber(more) })));
    const read = byId("read", HTMLElement);
    read.hidden = shown.length === 0;
    read.replaceChildren(...shown);
    this.text.setAttribute("aria-invalid", String(problems.length > 0));
    const lines = problems.map(({ line, key }) => t("lineProblem", { line, problem: t(key) }));
    byId("examples-problem", HTMLElement).replaceChildren(...problemList(lines));
  }

  /**
   * One action at a time; its failure is shown.
   * @param {() => Promise<void>} action
   */
  async #act(action) {
    if (this.isBusy) return;
    this.isBusy = true;
    const buttons = ["check", "start"].map((id) => byId(id, HTMLButtonElement));
    for (const button of buttons) button.setAttribute("aria-disabled", "true"); // a disabled one would lose the focus
    try {
      this.#readText();
      await action();
    } catch (error) {
      const failure = failureOf(error);
      this.#showOutcome(() => [make("p", { class: "problem" }, Object.values(explain(failure)).join(" "))]);
    }
    for (const button of buttons) button.setAttribute("aria-disabled", "false");
    this.isBusy = false;
  }

  /** @param {() => HTMLElement[]} elements in the current language */
  #showOutcome(elements) {
    this.outcome = () => byId("check-result", HTMLElement).replaceChildren(...elements());
    this.outcome();
  }

  /**
   * Upload the examples, unless they are on the server.
   * @returns {Promise<Uploaded | null>} null if they cannot be used; the form says why
   */
  async #upload() {
    const held = readNumber("held", { min: 0, max: MAX_HELD_PERCENT, whole: true });
    const epochs = readNumber("epochs", { min: 1, max: MAX_EPOCHS, whole: true });
    if (this.read.examples.length === 0 || this.read.problems.length > 0) {
      const key = this.read.problems.length > 0 ? "examplesWrong" : "examplesNone";
      this.#showOutcome(() => [make("p", { class: "problem" }, t(key))]);
      this.text.focus();
      return null;
    }
    if (held === "wrong" || epochs === "wrong") return null;
    const examples = divide(this.read.examples, held ?? 0);
    const [training, validation] = [jsonLines(examples.training), jsonLines(examples.validation)];
    const about = JSON.stringify([training, validation, epochs]);
    if (this.uploaded?.about === about) return this.uploaded;
    this.#forget();
    /** @type {CheckBody} */
    const body = { training_file: await this.server.uploadExamples("examples.jsonl", training) };
    if (validation !== "") body.validation_file = await this.server.uploadExamples("validation.jsonl", validation);
    if (epochs !== null) body.hyperparameters = { n_epochs: epochs };
    this.uploaded = { about, examples, body, checked: null };
    return this.uploaded;
  }

  async #check() {
    const text = this.text.value;
    const uploaded = await this.#upload();
    if (uploaded === null) return;
    if (uploaded.checked === null) {
      this.#showOutcome(() => [make("p", { class: "hint" }, t("checking"))]);
      uploaded.checked = await this.server.checkExamples(uploaded.body);
    }
    if (this.text.value === text) this.#showOutcome(() => checkedView(uploaded));
  }

  /** Delete the files of another check, which no job has. */
  #forget() {
    const { training_file: training, validation_file: validation } = this.uploaded?.body ?? {};
    for (const id of [training, validation]) {
      if (id !== undefined) this.server.deleteFile(id).catch(failureOf);
    }
    this.uploaded = null;
  }

  async #start() {
    const settings = readSettings();
    if (settings === "wrong") return;
    const uploaded = await this.#upload();
    const model = this.model();
    if (uploaded === null || model === null) return;
    if (!canEvaluate(settings, uploaded.body.validation_file !== undefined)) return;
    if (uploaded.checked !== null) this.#showOutcome(() => checkedView(uploaded));
    if ((uploaded.checked?.problems.length ?? 0) > 0) return; // otherwise the job checks them
    const job = await this.server.createJob({ ...uploaded.body, ...settings, model });
    this.uploaded = null; // the job has the files now
    this.started(job);
  }
}

/**
 * One example as the turns of a chat.
 * @param {Example} example
 */
function chatView({ messages }) {
  const turns = messages.map(({ role, content }) =>
    make(
      "p",
      { class: `turn ${role === "assistant" ? "learned" : ""}`, dir: "auto" },
      make("b", {}, t(role === "assistant" ? "roleAnswer" : role === "user" ? "roleQuestion" : "roleOther")),
      content,
    ),
  );
  return make("div", { class: "chat" }, ...turns);
}

/** @param {readonly string[]} problems */
function problemList(problems) {
  if (problems.length === 0) return [];
  const shown = problems.slice(0, SHOWN_PROBLEMS).map((problem) => make("li", {}, problem));
  const more = problems.length - shown.length;
  if (more > 0) shown.push(make("li", {}, t("problemsMore", { count: formatNumber(more) })));
  return [make("ul", { class: "problems" }, ...shown)];
}

/** @param {Uploaded} uploaded */
function checkedView({ examples, checked }) {
  if (checked === null) return [];
  const { problems, tokens, steps, memory, seconds } = checked;
  if (problems.length > 0) {
    const lines = problems.map(({ line, message }) =>
      line === null ? message : t("lineProblem", { line, problem: message }),
    );
    return [make("div", { class: "problem" }, ...problemList(lines))];
  }
  const parts = [t("checkedCount", { count: formatNumber(examples.training.length) })];
  if (examples.validation.length > 0) {
    parts.push(t("checkedHeld", { count: formatNumber(examples.validation.length) }));
  }
  if (steps !== null && tokens !== null) {
    const epochs = checked.hyperparameters.n_epochs;
    parts.push(t("checkedSteps", { steps: formatNumber(steps), epochs, tokens: formatNumber(tokens) }));
  }
  if (memory !== null) parts.push(t("checkedMemory", { size: formatBytes(memory) }));
  if (seconds !== null) parts.push(t("checkedTime", { time: durationOf(seconds) }));
  return [make("p", { class: "checked" }, parts.join(" "))];
}

/** @param {number} seconds */
export function durationOf(seconds) {
  if (seconds < 60) return t("secondsLong", { count: formatNumber(Math.ceil(seconds)) });
  return t("minutesLong", { count: formatNumber(Math.ceil(seconds / 60)) });
}
