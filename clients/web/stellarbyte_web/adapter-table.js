// The table of the server's adapters, by the memory that holds them, each with a button to unload it.

/** @import { AdapterEntry } from "../types.js" */

import { make } from "./elements.js";
import { formatBytes, formatNumber, t } from "./i18n.js";

const TIERS = /** @type {const} */ (["gpu", "slot", "cpu", "disk"]);
const TIER_NAMES = /** @type {const} */ ({ gpu: "tierGpu", slot: "tierSlot", cpu: "tierCpu", disk: "tierDisk" });
const STATE_NAMES = /** @type {const} */ ({
  loading: "stateLoading",
  ready: "stateReady",
  draining: "stateDraining",
  failed: "stateFailed",
});

export class AdapterTable {
  /** @param {(name: string) => void} unload */
  constructor(unload) {
    this.unload = unload;
    this.element = make("div", { class: "table-frame", tabindex: "0" });
    this.shown = "";
    /** The adapter with a button pressed once; another press unloads it. */
    this.asked = "";
  }

  /**
   * @param {readonly AdapterEntry[]} entries
   * @param {boolean} isAnew even if the entries have not changed, as after a change of language
   */
  show(entries, isAnew = false) {
    const text = JSON.stringify(entries);
    if (text === this.shown && !isAnew) return;
    if (this.element.querySelector("button:active") !== null) return; // otherwise the press would be lost
    this.shown = text;
    const focused =
      document.activeElement instanceof HTMLElement ? document.activeElement.dataset["unload"] : undefined;
    const { asked } = this; // reset when its button loses the focus, also by being replaced
    this.element.replaceChildren(
      entries.length === 0 ? make("p", { class: "hint none" }, t("noAdapters")) : this.#table(entries),
    );
    this.asked = entries.some(({ id }) => id === asked) ? asked : "";
    if (focused === undefined) return;
    for (const button of this.element.querySelectorAll("button"))
      if (button.dataset["unload"] === focused) button.focus();
  }

  /** @param {readonly AdapterEntry[]} entries */
  #table(entries) {
    const heads = /** @type {const} */ (["name", "state", "inUse", "answered", "tokens", "size", "rank", "actions"]);
    const head = make("tr", {}, ...heads.map((key) => make("th", { scope: "col", class: key }, t(key))));
    const groups = TIERS.map((tier) => ({ tier, members: entries.filter((entry) => entry.tier === tier) }));
    const bodies = groups
      .filter(({ members }) => members.length > 0)
      .map(({ tier, members }) => {
        const title = make(
          "th",
          { colspan: String(heads.length), scope: "rowgroup", class: "tier" },
          t(TIER_NAMES[tier]),
        );
        return make("tbody", {}, make("tr", {}, title), ...members.map((entry) => this.#row(entry)));
      });
    return make("table", {}, make("thead", {}, head), ...bodies);
  }

  /** @param {AdapterEntry} entry */
  #row(entry) {
    const state = make(
      "span",
      { class: `badge ${entry.state}`, title: entry.error ?? "" },
      t(STATE_NAMES[entry.state]),
    );
    const error = entry.error === null ? [] : [make("p", { class: "problem" }, entry.error)];
    const hash =
      entry.content_hash === null
        ? []
        : [make("code", { class: "hash", title: entry.content_hash }, entry.content_hash.slice(0, 8))];
    const number = (/** @type {number | null} */ value, /** @type {string} */ name) =>
      make("td", { class: `amount ${name}` }, value === null ? "–" : formatNumber(value));
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, make("span", { class: "adapter-name" }, entry.id), ...hash),
      make("td", {}, state, ...error),
      number(entry.refcount, "inUse"),
      number(entry.requests, "answered"),
      number(entry.tokens, "tokens"),
      make("td", { class: "amount size" }, entry.bytes > 0 ? formatBytes(entry.bytes) : "–"),
      number(entry.rank, "rank"),
      make("td", { class: "actions" }, this.#unloadButton(entry.id)),
    );
  }

  /** @param {string} name */
  #unloadButton(name) {
    const button = make("button", { type: "button" });
    const show = () => {
      const isAsked = this.asked === name;
      button.textContent = t(isAsked ? "sure" : "unload");
      button.classList.toggle("sure", isAsked);
      button.setAttribute("aria-label", `${isAsked ? `${t("sure")} ` : ""}${t("unloadOf", { name })}`);
    };
    show();
    button.dataset["unload"] = name;
    button.addEventListener("click", () => {
      if (this.asked === name) {
        this.asked = "";
        this.unload(name);
        return;
      }
      this.asked = name;
      show();
    });
    button.addEventListener("blur", () => {
      if (!button.isConnected || this.asked !== name) return;
      this.asked = "";
      show();
    });
    return button;
  }
}
