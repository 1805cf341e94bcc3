// What a job that is over has left on the server, its files and its model, and the buttons that delete them.

/** @import { TuningJob } from "../types.js" */
/** @import { Server } from "./api.js" */
/** @import { Key } from "./i18n.js" */

import { failureOf } from "./api.js";
import { make } from "./elements.js";
import { explain } from "./failures.js";
import { t } from "./i18n.js";
import { isOver } from "./job-states.js";
import { SureButton } from "./sure-button.js";

export class JobRemains {
  /**
   * @param {Server} server
   * @param {() => void} changed something of the job was deleted
   * @param {() => void} refocus the button with the focus goes
   */
  constructor(server, changed, refocus) {
    this.server = server;
    this.changed = changed;
    this.refocus = refocus;
    /** @type {TuningJob | null} */
    this.job = null;
    this.known = ""; // the state of the job whose files are known
    /** @type {string[]} */
    this.files = [];
    /** @type {(() => string) | null} The outcome of the last button, in the current language. */
    this.outcome = null;
    this.isBusy = false;
    this.filesButton = new SureButton(
      () => t("deleteFiles"),
      () => void this.#act("filesDeleted", (job) => this.#deleteFiles(job)),
    );
    this.modelButton = new SureButton(
      () => t("deleteModel"),
      () => void this.#act("modelDeleted", (job) => this.server.deleteModel(job.fine_tuned_model ?? "")),
    );
    this.buttons = make("p", { class: "row" }, this.filesButton.element, this.modelButton.element);
    this.hint = make("p", { class: "note" });
    this.result = make("p", { class: "note", role: "status" });
    this.element = make("div", { class: "remains" }, this.buttons, this.hint, this.result);
  }

  /** @param {TuningJob} job as it is now */
  show(job) {
    if (job.id !== this.job?.id) {
      this.outcome = null;
      this.files = [];
      for (const button of [this.filesButton, this.modelButton]) button.show(false); // asked of another job
    }
    this.job = job;
    const state = `${job.id} ${job.status}`;
    if (state !== this.known) {
      this.known = state;
      if (isOver(job)) void this.#readFiles(job, state);
    }
    this.#draw();
  }

  #draw() {
    const { job } = this;
    if (job === null) return;
    const hasModel = job.status === "succeeded" && job.fine_tuned_model !== null;
    this.filesButton.show(this.files.length > 0);
    this.modelButton.show(hasModel);
    this.buttons.hidden = !hasModel && this.files.length === 0;
    this.hint.textContent = hasModel ? t("deleteModelHint") : "";
    this.result.textContent = this.outcome?.() ?? "";
  }

  /**
   * @param {TuningJob} job
   * @param {string} state of it, which is the known one
   */
  async #readFiles(job, state) {
    try {
      const files = await this.#filesOf(job);
      if (state !== this.known) return;
      this.files = files;
      this.#draw();
    } catch (error) {
      failureOf(error);
      if (state === this.known) this.known = ""; // read again with the next look at the job
    }
  }

  /**
   * The files of a job that are still there, and that no unfinished job reads.
   * @param {TuningJob} job
   */
  async #filesOf(job) {
    const [stored, jobs] = await Promise.all([this.server.tuningFiles(), this.server.jobs()]);
    const read = jobs.filter((other) => !isOver(other)).flatMap(inputsOf);
    return [...inputsOf(job), ...job.result_files].filter((id) => stored.includes(id) && !read.includes(id));
  }

  /** @param {TuningJob} job */
  async #deleteFiles(job) {
    for (const id of await this.#filesOf(job)) await this.server.deleteFile(id);
  }

  /**
   * One deletion at a time; its outcome is shown.
   * @param {Key} done
   * @param {(job: TuningJob) => Promise<void>} remove
   */
  async #act(done, remove) {
    const { job } = this;
    if (this.isBusy || job === null) return;
    this.isBusy = true;
    const hadFocus = this.buttons.contains(document.activeElement);
    let outcome = () => t(done);
    let isDone = true;
    try {
      await remove(job);
    } catch (error) {
      isDone = false;
      const failure = failureOf(error);
      // Not the chat's sentence, which asks to choose another model.
      outcome = () => (failure.status === 404 ? failure.message : Object.values(explain(failure)).join(" "));
    }
    this.isBusy = false;
    if (job.id === this.job?.id) {
      this.outcome = outcome;
      this.known = ""; // what is left is read again
      this.show(this.job);
      if (isDone && hadFocus) this.refocus();
    }
    this.changed();
  }
}

/** @param {TuningJob} job */
function inputsOf({ training_file: training, validation_file: validation }) {
  return validation === null ? [training] : [training, validation];
}
