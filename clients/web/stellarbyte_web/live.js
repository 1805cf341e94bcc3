// Makes a job's model live under a name, goes back to an earlier version, and shows the history of the name.

/** @import { AdapterHistory, AdapterVersion, TuningJob } from "../types.js" */
/** @import { Server } from "./api.js" */

import { failureOf } from "./api.js";
import { byId, make } from "./elements.js";
import { explain } from "./failures.js";
import { readName, readNumber } from "./form-fields.js";
import { formatNumber, formatTime, t } from "./i18n.js";

export class Live {
  /**
   * @param {Server} server
   * @param {() => void} changed a name has another version now
   */
  constructor(server, changed) {
    this.server = server;
    this.changed = changed;
    this.name = byId("live-name", HTMLInputElement);
    /** @type {TuningJob | null} */
    this.job = null;
    /** @type {AdapterHistory | null} */
    this.history = null;
    this.isKnown = true; // whether the history could be read
    /** @type {(() => void) | null} Shows the last outcome again. */
    this.outcome = null;
    this.isBusy = false;
    this.name.addEventListener("change", () => void this.load());
    byId("live-form", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#publish();
    });
  }

  /** @param {TuningJob | null} job that has succeeded; null: there is none */
  show(job) {
    const isOther = job?.id !== this.job?.id;
    this.job = job;
    byId("live", HTMLElement).hidden = job === null;
    if (!isOther || job === null) return;
    this.name.value = job.user_provided_suffix ?? "";
    this.outcome = null;
    byId("live-outcome", HTMLElement).replaceChildren();
    void this.load();
  }

  /** Show everything again, in the current language. */
  translate() {
    this.#showHistory();
    this.outcome?.();
  }

  /** Load the history of the name in the field; none while it is not in use. */
  async load() {
    const name = this.name.value.trim();
    try {
      const adapters = await this.server.adapters();
      const history = adapters.some(({ id }) => id === name) ? await this.server.versions(name) : null;
      if (name !== this.name.value.trim()) return;
      this.history = history;
      this.isKnown = true;
    } catch (error) {
      failureOf(error); // whoever may not see it is told so when he wants to change it
      this.history = null;
      this.isKnown = false;
    }
    this.#showHistory();
  }

  async #publish() {
    const name = readName("live-name", { required: true, rule: "adapterRule" });
    const percent = readNumber("live-share", { min: 1, max: 100 });
    const { job } = this;
    if (name === "wrong" || percent === "wrong" || job === null) return;
    const isShared = percent !== null && percent < 100;
    await this.#act(async () => {
      await this.server.publish(job.id, isShared ? { name, share: percent / 100 } : { name });
      return () => t("published", { name });
    });
  }

  /** @param {number} version */
  #goTo(version) {
    const name = this.history?.id ?? "";
    return this.#act(async () => {
      await this.server.rollBack(name, version);
      return () => t("wentBack", { name, version });
    });
  }

  /**
   * One action at a time; its outcome is shown.
   * @param {() => Promise<() => string>} action returns what happened, in the current language
   */
  async #act(action) {
    if (this.isBusy) return;
    this.isBusy = true;
    const button = byId("publish", HTMLButtonElement);
    button.setAttribute("aria-disabled", "true"); // a disabled button would lose the focus
    let isGood = true;
    /** @type {() => string} */
    let sentence;
    try {
      sentence = await action();
    } catch (error) {
      const failure = failureOf(error);
      isGood = false;
      // Not the chat's sentence, which asks to choose another model.
      sentence = () => (failure.status === 404 ? failure.message : Object.values(explain(failure)).join(" "));
    }
    this.outcome = () =>
      byId("live-outcome", HTMLElement).replaceChildren(
        make("p", { class: `banner ${isGood ? "good" : "bad"}` }, sentence()),
      );
    this.outcome();
    button.setAttribute("aria-disabled", "false");
    this.isBusy = false;
    await this.load();
    this.changed();
  }

  #showHistory() {
    const { history } = this;
    const shown = byId("history", HTMLElement);
    const focused = shown.contains(document.activeElement);
    if (history === null) {
      shown.replaceChildren(...(this.isKnown ? [make("p", { class: "hint" }, t("historyNone"))] : []));
    } else {
      const heads = /** @type {const} */ (["historyVersion", "historyMade", "historyCallers", "actions"]);
      const head = make(
        "tr",
        {},
        ...heads.map((key) => make("th", { scope: "col", class: key === "actions" ? "go" : "" }, t(key))),
      );
      const rows = history.data.toReversed().map((version) => this.#row(version));
      const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
      const title = make("h3", { id: "history-title", tabindex: "-1" }, t("historyTitle", { name: history.id }));
      shown.replaceChildren(title, make("div", { class: "table-frame", tabindex: "0" }, table));
    }
    if (focused) document.getElementById("history-title")?.focus(); // its button may be gone
  }

  /** @param {AdapterVersion} version */
  #row(version) {
    const share = version.share ?? (version.current ? 1 : 0);
    const callers = share > 0 ? formatNumber(share, { style: "percent", maximumFractionDigits: 1 }) : "–";
    const hash = make("code", { class: "hash", title: version.content_hash }, version.content_hash.slice(0, 8));
    const isLive = version.current && share === 1;
    const button = make(
      "button",
      { type: "button", click: () => void this.#goTo(version.version), hidden: isLive },
      t("useVersion", { version: version.version }),
    );
    const badge = version.current ? [make("span", { class: "badge ready" }, t("liveNow"))] : [];
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, make("b", {}, String(version.version)), hash, ...badge),
      make("td", {}, formatTime(version.created_at)),
      make("td", {}, callers),
      make("td", { class: "go" }, button),
    );
  }
}
