// The status page: polls the server's state every second, and loads and unloads adapters. Pauses while hidden.

/** @import { AdapterEntry, Failure } from "../types.js" */

import { AdapterTable } from "./adapter-table.js";
import { Server, failureOf } from "./api.js";
import { hideBanner, showBanner, translateBanner } from "./banner.js";
import { Dashboard } from "./dashboard.js";
import { byId, make } from "./elements.js";
import { explain } from "./failures.js";
import { keptKey, showCondition, startFrame, startKeyField } from "./frame.js";
import { formatBytes, t } from "./i18n.js";
import { parseMetrics } from "./prometheus.js";

const PAUSE_MS = 1000;

/** @type {AdapterEntry[]} */
let adapters = [];

startFrame(() => {
  table.show(adapters, true);
  dashboard.draw(Date.now());
  translateBanner();
});

const admin = new Server(document.baseURI, () => keptKey("admin-key"));
const server = new Server(document.baseURI, () => keptKey("key") || keptKey("admin-key"));
const dashboard = new Dashboard();
const table = new AdapterTable((name) => void unload(name));
byId("charts", HTMLElement).append(...dashboard.elements);
byId("adapters", HTMLElement).append(table.element);
startKeyField("key", "key", () => void refresh());
startKeyField("admin-key", "admin-key", () => void refresh());

/** Poll once, and show the answers. If the server fails meanwhile, the next poll shows it. */
async function refresh() {
  await readAll().catch(failureOf);
}

async function readAll() {
  const [metrics, entries, readiness] = await Promise.allSettled([server.metrics(), server.adapters(), server.ready()]);
  dashboard.add(Date.now(), metrics.status === "fulfilled" ? parseMetrics(metrics.value) : null);
  if (entries.status === "fulfilled") {
    adapters = entries.value;
    table.show(adapters);
  }
  if (readiness.status === "rejected") {
    const failure = failureOf(readiness.reason);
    isDescribed = false; // the server may return with another version or model
    showCondition(failure.kind === "gone" ? "notReachable" : "notReady");
    if (failure.kind === "gone") showBanner("bad", () => t("bannerGone"));
    else showBanner("bad", () => t("bannerNotReady", { message: failure.message }));
  } else if (entries.status === "rejected") {
    const failure = failureOf(entries.reason);
    showCondition(failure.status === 401 ? "needsKey" : "ready");
    showBanner("bad", () => (failure.status === 401 ? t("bannerKey") : sentenceOf(failure)));
  } else {
    showCondition("ready");
    hideBanner();
    if (!isDescribed) await describe();
  }
}

let isDescribed = false;

/** Show version and model, which do not change while a server runs. */
async function describe() {
  const [version, models] = await Promise.all([server.version(), server.models()]);
  byId("version", HTMLElement).textContent = version;
  byId("model", HTMLElement).textContent = models[0]?.id ?? "–";
  isDescribed = true;
}

/** @param {Failure} failure */
function sentenceOf(failure) {
  if (failure.status === 404) return failure.message; // not the chat's sentence, which asks to choose another model
  return Object.values(explain(failure)).join(" ");
}

async function readForEver() {
  try {
    if (!document.hidden) await refresh();
  } finally {
    setTimeout(() => void readForEver(), PAUSE_MS);
  }
}

/**
 * @param {boolean} isGood
 * @param {string} sentence
 */
function showOutcome(isGood, sentence) {
  byId("outcome", HTMLElement).replaceChildren(make("p", { class: `banner ${isGood ? "good" : "bad"}` }, sentence));
}

/** @param {string} name */
async function unload(name) {
  try {
    const { freed_bytes } = await admin.unloadAdapter(name);
    showOutcome(true, t("unloaded", { name, size: formatBytes(freed_bytes) }));
  } catch (error) {
    showOutcome(false, sentenceOf(failureOf(error)));
  }
  await refresh();
}

/**
 * The text of a field of the form; if it is empty, "" and a note next to the field.
 * @param {string} id
 * @param {"nameMissing" | "pathMissing"} problem
 */
function readRequired(id, problem) {
  const field = byId(id, HTMLInputElement);
  const value = field.value.trim();
  field.setAttribute("aria-invalid", String(value === ""));
  byId(`${id}-problem`, HTMLElement).textContent = value === "" ? t(problem) : "";
  return value;
}

byId("load", HTMLFormElement).addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = byId("load-button", HTMLButtonElement);
  if (button.getAttribute("aria-disabled") === "true") return;
  const name = readRequired("adapter-name", "nameMissing");
  const path = readRequired("adapter-path", "pathMissing");
  if (name === "" || path === "") return;
  button.setAttribute("aria-disabled", "true"); // a disabled button would lose the focus
  button.textContent = t("loading");
  try {
    const loaded = await admin.loadAdapter(name, path, byId("in-place", HTMLInputElement).checked);
    showOutcome(true, t("loaded", { name, size: formatBytes(loaded.bytes), count: loaded.matched.length }));
  } catch (error) {
    showOutcome(false, sentenceOf(failureOf(error)));
  }
  button.setAttribute("aria-disabled", "false");
  button.textContent = t("load");
  await refresh();
});

void readForEver();
