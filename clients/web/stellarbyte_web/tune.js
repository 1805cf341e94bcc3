// The page for fine-tuning: connects its parts, and polls the jobs of the server while it is seen.

/** @import { Failure, ModelCard, TuningJob } from "../types.js" */

import { Server, failureOf } from "./api.js";
import { hideBanner, showBanner, translateBanner } from "./banner.js";
import { Comparison } from "./comparison.js";
import { byId, make } from "./elements.js";
import { ExamplesForm } from "./examples-form.js";
import { explain } from "./failures.js";
import { keptKey, showCondition, startFrame, startKeyField } from "./frame.js";
import { formatTime, t } from "./i18n.js";
import { STATUS_NAMES, isOver, jobName } from "./job-states.js";
import { JobView } from "./job-view.js";
import { Live } from "./live.js";
import { session } from "./storage.js";

const BUSY_MS = 1500; // between polls
const IDLE_MS = 5000;

/** @type {TuningJob[]} */
let jobs = [];
/** @type {readonly ModelCard[]} */
let cards = [];
let chosen = session.read("tune-job");
let isKnown = false;

startFrame(() => {
  form.show();
  view.draw();
  comparison.translate();
  live.translate();
  translateBanner();
  shownJobs = "";
  show();
});

const server = new Server(document.baseURI, () => keptKey("key") || keptKey("admin-key"));
const view = new JobView(server, () => void refresh());
const comparison = new Comparison(server);
const admin = new Server(document.baseURI, () => keptKey("admin-key") || keptKey("key"));
const live = new Live(admin, () => void refresh());
const form = new ExamplesForm(
  server,
  (job) => {
    jobs = [job, ...jobs];
    choose(job.id);
    byId("jobs-title", HTMLElement).scrollIntoView({ block: "start" });
  },
  () => cards[0]?.id ?? null,
);
byId("job", HTMLElement).append(view.element);
startKeyField("key", "key", () => void refresh());
startKeyField("admin-key", "admin-key", () => void live.load());

/** @type {Promise<void> | null} */
let polling = null;
let isAgain = false;

/** Poll, or once more if a poll has begun before, and show the answers. */
async function refresh() {
  isAgain = true;
  polling ??= poll();
  await polling;
}

async function poll() {
  try {
    while (isAgain) {
      isAgain = false;
      await readAll();
    }
  } finally {
    polling = null;
  }
}

async function readAll() {
  try {
    [jobs, cards] = await Promise.all([server.jobs(), server.models()]);
    isKnown = true;
    showCondition("ready");
    hideBanner();
  } catch (error) {
    const failure = failureOf(error);
    showCondition(failure.status === 401 ? "needsKey" : failure.kind === "gone" ? "notReachable" : "ready");
    const enterKey = () => byId("key", HTMLInputElement).focus();
    const actions = failure.status === 401 ? [{ key: /** @type {const} */ ("openSettings"), act: enterKey }] : [];
    showBanner("bad", () => sentenceOf(failure), actions);
  }
  show();
}

/** @param {Failure} failure */
function sentenceOf(failure) {
  if (failure.status === 401) return t("bannerKey");
  if (failure.kind === "gone") return t("bannerGone");
  return Object.values(explain(failure)).join(" ");
}

/** @param {string} id of a job */
function choose(id) {
  chosen = id;
  session.write("tune-job", id);
  show();
}

function show() {
  const job = jobs.find(({ id }) => id === chosen) ?? jobs[0] ?? null;
  const before = announced;
  announced = job === null ? "" : `${job.id} ${job.status}`;
  if (job !== null && before.startsWith(job.id) && before !== announced) {
    const state = t(STATUS_NAMES[job.status]);
    byId("announcer", HTMLElement).textContent = t("jobAnnounced", { name: jobName(job), state });
  }
  showJobs(job);
  view.show(job);
  const succeeded = job?.status === "succeeded" && job.fine_tuned_model !== null ? job : null;
  comparison.show(succeeded?.fine_tuned_model ?? null, cards, succeeded === null ? null : versionBefore(succeeded));
  live.show(succeeded);
}

let announced = "";

/**
 * The model of an earlier job with the same name that is still served; null if there is none.
 * @param {TuningJob} job
 */
function versionBefore(job) {
  const isBefore = (/** @type {TuningJob} */ other) =>
    other.fine_tuned_model !== null &&
    other.user_provided_suffix === job.user_provided_suffix &&
    (other.finished_at ?? 0) < (job.finished_at ?? 0) &&
    cards.some(({ id }) => id === other.fine_tuned_model);
  return jobs.find((other) => other.id !== job.id && isBefore(other))?.fine_tuned_model ?? null;
}

let shownJobs = "";

/** @param {TuningJob | null} current */
function showJobs(current) {
  const text = JSON.stringify([jobs.map(({ id, status }) => [id, status]), current?.id, isKnown]);
  if (text === shownJobs) return;
  shownJobs = text;
  const list = byId("jobs", HTMLElement);
  const focused = document.activeElement instanceof HTMLElement ? document.activeElement.dataset["job"] : undefined;
  const items = jobs.map((job) => {
    const badge = make("span", { class: `badge ${job.status}` }, t(STATUS_NAMES[job.status]));
    const button = make(
      "button",
      { type: "button", class: "quiet job-choice", click: () => choose(job.id) },
      make("b", {}, jobName(job)),
      badge,
      make("span", { class: "hint" }, formatTime(job.created_at)),
    );
    button.dataset["job"] = job.id;
    if (job.id === current?.id) button.setAttribute("aria-current", "true");
    return make("li", {}, button);
  });
  const none = isKnown ? [make("li", { class: "hint" }, t("jobsNone"))] : [];
  list.replaceChildren(...(items.length > 0 ? items : none));
  if (focused === undefined) return;
  for (const button of list.querySelectorAll("button")) if (button.dataset["job"] === focused) button.focus();
}

async function readForEver() {
  try {
    if (!document.hidden) await refresh();
  } finally {
    setTimeout(() => void readForEver(), jobs.some((job) => !isOver(job)) ? BUSY_MS : IDLE_MS);
  }
}

void readForEver();
