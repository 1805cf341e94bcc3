// The view of one job: its state and progress, its losses as they come, and its buttons.

/** @import { JobEvent, TuningJob } from "../types.js" */
/** @import { Server } from "./api.js" */
/** @import { LossPoint } from "./loss-chart.js" */

import { failureOf } from "./api.js";
import { make } from "./elements.js";
import { durationOf } from "./examples-form.js";
import { explain } from "./failures.js";
import { currentLanguage, formatNumber, formatTime, t } from "./i18n.js";
import { JobRemains } from "./job-remains.js";
import { resultView } from "./job-result.js";
import { STATUS_NAMES, isOver, jobName } from "./job-states.js";
import { LossChart, describe } from "./loss-chart.js";

const AGAIN_MS = 1000; // after a stream has ended or broken

export class JobView {
  /**
   * @param {Server} server
   * @param {() => void} changed the server's list of jobs has changed
   */
  constructor(server, changed) {
    this.server = server;
    this.changed = changed;
    /** @type {TuningJob | null} */
    this.job = null;
    this.following = new AbortController();
    /** @type {JobEvent[]} */
    this.events = [];
    this.isDrawn = true;
    /** @type {(() => string) | null} Why the last button did nothing, in the current language. */
    this.refusal = null;
    this.chart = new LossChart();
    this.state = make("p", { class: "job-state" });
    this.progress = make("progress", { max: "1" });
    this.sentence = make("p", { class: "hint" });
    this.problem = make("p", { class: "problem" });
    this.result = make("div", { class: "result" });
    this.shownResult = "";
    this.buttons = make("p", { class: "row" });
    this.summary = make("summary");
    this.log = make("ol", { class: "log" });
    this.remains = new JobRemains(server, changed, () => this.summary.focus());
    this.element = make(
      "div",
      { class: "job", hidden: true },
      this.state,
      this.progress,
      this.problem,
      this.chart.element,
      this.sentence,
      this.result,
      this.buttons,
      this.remains.element,
      make("details", {}, this.summary, this.log),
    );
  }

  /** @param {TuningJob | null} job as it is now */
  show(job) {
    const isOther = job?.id !== this.job?.id;
    this.job = job;
    this.element.hidden = job === null;
    if (isOther) {
      this.refusal = null;
      this.#follow();
    }
    this.draw();
  }

  #follow() {
    this.following.abort();
    this.following = new AbortController();
    this.events = [];
    if (this.job !== null) void this.#readEvents(this.job.id, this.following.signal);
  }

  /**
   * Read the events of a job until it is over; a stream that has broken is continued.
   * @param {string} id
   * @param {AbortSignal} signal
   */
  async #readEvents(id, signal) {
    for (;;) {
      let isComplete = false;
      try {
        const after = this.events[this.events.length - 1]?.id ?? null;
        for await (const event of this.server.jobEvents(id, after, signal)) this.#add(event);
        isComplete = true;
        this.changed();
      } catch (error) {
        if (signal.aborted) return;
        const status = failureOf(error).status ?? 500;
        if (status !== 401 && status < 500) return; // with another key, it may be there again
      }
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
      if (signal.aborted || this.job === null || (isComplete && isOver(this.job))) return;
    }
  }

  /** @param {JobEvent} event */
  #add(event) {
    this.events.push(event);
    if (event.data === null) this.changed(); // such events are about the state
    if (!this.isDrawn) return;
    this.isDrawn = false;
    setTimeout(() => {
      this.isDrawn = true;
      this.draw();
    }, 50); // of many events at once
  }

  get #steps() {
    const last = this.events.findLast(({ data }) => data !== null)?.data ?? null;
    return { step: last?.step ?? 0, steps: Math.max(1, last?.total_steps ?? 1) };
  }

  /** Show the current state, in the current language. */
  draw() {
    const { job } = this;
    if (job === null) return;
    const { step, steps } = this.#steps;
    const badge = make("span", { class: `badge ${job.status}` }, t(STATUS_NAMES[job.status]));
    const name = make("b", {}, job.fine_tuned_model ?? jobName(job));
    this.state.replaceChildren(badge, name);
    this.progress.value = job.status === "succeeded" ? 1 : step / steps;
    this.progress.setAttribute("aria-label", t("jobProgress"));
    this.progress.hidden = isOver(job);
    this.problem.textContent = this.refusal?.() ?? job.error?.message ?? "";
    const losses = { steps, train: this.#losses("train_loss"), valid: this.#losses("valid_loss") };
    this.chart.element.hidden = losses.train.length === 0;
    this.chart.draw(losses);
    const sentences = [describe(losses)];
    if (step > 0) sentences.unshift(t("stepOf", { step: formatNumber(step), steps: formatNumber(steps) }));
    const leftS = job.estimated_finish === null ? 0 : job.estimated_finish - Date.now() / 1000;
    if (job.status === "running" && leftS > 0) sentences.push(t("timeLeft", { time: durationOf(leftS) }));
    this.sentence.textContent = sentences.join(" ");
    this.#showResult(job);
    this.#showButtons(job);
    this.remains.show(job);
    this.summary.textContent = t("jobLog");
    const messages = this.events.filter(({ data }) => data === null);
    this.log.replaceChildren(
      ...messages.map(({ created_at: at, level, message }) =>
        make("li", { class: level }, make("time", {}, formatTime(at)), ` ${message}`),
      ),
    );
  }

  /**
   * By step, ascending.
   * @param {"train_loss" | "valid_loss"} name
   * @returns {LossPoint[]}
   */
  #losses(name) {
    const found = new Map();
    for (const { data } of this.events) {
      if (data !== null && data[name] !== undefined) found.set(data.step, data[name]);
    }
    return [...found].sort(([one], [other]) => one - other);
  }

  /** @param {TuningJob} job */
  #showResult(job) {
    const { status, losses, exact_match: exact, publish } = job;
    const text = JSON.stringify([job.id, status, losses, exact, publish, currentLanguage()]);
    if (text === this.shownResult) return; // a table keeps the focus and its place
    this.shownResult = text;
    this.result.replaceChildren(...resultView(job));
  }

  /** @param {TuningJob} job */
  #showButtons(job) {
    /** @type {("pause" | "resume" | "cancel")[]} */
    const wanted = [];
    if (job.status === "queued" || job.status === "running") wanted.push("pause");
    if (job.status === "paused") wanted.push("resume");
    if (!isOver(job)) wanted.push("cancel");
    const names = /** @type {const} */ ({ pause: "jobPause", resume: "jobResume", cancel: "jobCancel" });
    const shown = [...this.buttons.querySelectorAll("button")].map((button) => button.textContent).join();
    if (shown === wanted.map((change) => t(names[change])).join()) return; // a button keeps the focus
    const hadFocus = this.buttons.contains(document.activeElement);
    this.buttons.replaceChildren(
      ...wanted.map((change) =>
        make("button", { type: "button", click: () => void this.#change(change) }, t(names[change])),
      ),
    );
    if (!hadFocus) return;
    const first = this.buttons.querySelector("button");
    if (first !== null) first.focus();
    else this.summary.focus();
  }

  /** @param {"pause" | "resume" | "cancel"} change of the job that is shown now: buttons outlive a change of the job */
  async #change(change) {
    const id = this.job?.id;
    if (id === undefined) return;
    try {
      const job = await this.server.changeJob(id, change);
      this.refusal = null;
      if (job.id === this.job?.id) this.show(job);
    } catch (error) {
      const failure = failureOf(error);
      if (id === this.job?.id) this.refusal = () => Object.values(explain(failure)).join(" ");
      this.draw();
    }
    this.changed();
  }
}
