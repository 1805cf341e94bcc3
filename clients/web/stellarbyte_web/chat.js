// The chat page: connects its parts, and handles keys, connection, models and the composer.

/** @import { Answer } from "../types.js" */
/** @import { Link } from "./connection.js" */

import { announcementOf } from "./answer-view.js";
import { Server, failureOf } from "./api.js";
import { hideBanner, showBanner, translateBanner } from "./banner.js";
import { copyText } from "./clipboard.js";
import { Connection } from "./connection.js";
import { byId, make } from "./elements.js";
import { explain } from "./failures.js";
import { keptKey, showCondition, startFrame } from "./frame.js";
import { t } from "./i18n.js";
import { Playground } from "./playground.js";
import { SettingsPanel } from "./settings-panel.js";
import { SILENCE_S } from "./silence.js";
import { session } from "./storage.js";

const question = byId("question", HTMLTextAreaElement);
const send = byId("send", HTMLButtonElement);
const stop = byId("stop", HTMLButtonElement);
const compare = byId("compare", HTMLButtonElement);
const probabilities = byId("probabilities", HTMLButtonElement);
const announcer = byId("announcer", HTMLElement);
const composerProblem = byId("composer-problem", HTMLElement);

startFrame(() => {
  settings.showFields();
  playground.show();
  translateBanner();
});

const server = new Server(document.baseURI, () => keptKey("key"));
const connection = new Connection(server, showLink);
const settings = new SettingsPanel(() => void loadModels());
const playground = new Playground(server, settings, {
  changed: showComposer,
  asked: () => {
    announcer.replaceChildren();
    composerProblem.textContent = "";
    focusQuestion();
  },
  removed: focusQuestion,
  silent: (seconds) => {
    connection.watch(false);
    if (seconds === SILENCE_S) announcer.append(make("p", {}, t("silent", { seconds })));
  },
  finished,
  restored: ({ failure }) => {
    if (failure !== null) composerProblem.textContent = Object.values(explain(failure)).join(" ");
  },
  example: ask,
  modelsWanted: () => void loadModels(),
  notKept: () => showBanner("bad", () => t("bannerNotKept"), [{ key: "dismiss", act: hideBanner }]),
});

let modelRequests = 0;

/**
 * Load the list of models. Of several concurrent calls, as when keys are tried, only the last one counts.
 * @returns {Promise<boolean>} whether the list is known now
 */
async function loadModels() {
  modelRequests += 1;
  const turn = modelRequests;
  try {
    const cards = await server.models();
    if (turn !== modelRequests) return false;
    playground.showModels(cards);
    showCondition("ready");
    if (!connection.isWatching) hideBanner();
    return true;
  } catch (error) {
    const failure = failureOf(error);
    if (turn !== modelRequests) return false;
    if (failure.status === 401) {
      showCondition("needsKey");
      showBanner("bad", () => t("bannerKey"), [{ key: "openSettings", act: () => settings.enterKey() }]);
    } else if (failure.status === null || failure.status === 503) {
      connection.watch(true);
    } else {
      showBanner("bad", () => Object.values(explain(failure)).join(" "), [
        { key: "retry", act: () => void loadModels() },
      ]);
    }
    return false;
  }
}

/** @param {Link} link */
function showLink(link) {
  const now = { key: /** @type {const} */ ("retry"), act: () => connection.hurry() };
  if (link.state === "gone") {
    showCondition("notReachable");
    showBanner("bad", () => t("bannerGone"), [now]);
  } else if (link.state === "notReady") {
    showCondition("notReady");
    showBanner("bad", () => t("bannerNotReady", { message: link.message }), [now]);
  } else if (link.state === "back") {
    void serverIsBack();
  }
}

async function serverIsBack() {
  const isKnown = await loadModels();
  const retry = () => {
    hideBanner();
    playground.retryFailed();
  };
  if (!isKnown || !playground.canAsk) return;
  /** @type {import("./banner.js").BannerAction[]} */
  const actions = [{ key: "dismiss", act: hideBanner }];
  if (playground.hasFailed) actions.unshift({ key: "retry", act: retry });
  showBanner("good", () => t("bannerBack"), actions);
}

/** @param {Answer} answer */
function finished(answer) {
  if (answer.state === "failed") {
    if (answer.failure?.status === null || answer.failure?.status === 503) connection.watch(false);
    if (answer.failure?.status === 404) void loadModels();
  }
  announcer.append(make("p", {}, announcementOf(answer)));
}

/** Move the focus to the question when its element is gone; not on touch screens, where a keyboard would appear. */
function focusQuestion() {
  if (!matchMedia("(pointer: coarse)").matches) question.focus();
}

/**
 * @param {string} text
 * @returns {boolean} whether it was sent
 */
function ask(text) {
  if (text === "" || !playground.canAsk) return false;
  const isAsked = playground.ask(text);
  if (!isAsked) composerProblem.textContent = t("fixFields");
  return isAsked;
}

/** A question that cannot be sent yet stays in the field. */
function askDraft() {
  if (!ask(question.value.trim())) return;
  question.value = "";
  fitQuestion();
}

function showComposer() {
  const focused = document.activeElement;
  send.hidden = playground.isAsking;
  stop.hidden = !playground.isAsking;
  send.disabled = !playground.canAsk || question.value.trim() === "";
  compare.disabled = !playground.canCompare || playground.isAsking;
  probabilities.setAttribute("aria-pressed", String(playground.withTokens));
  if (focused instanceof HTMLButtonElement && (focused.hidden || focused.disabled)) focusQuestion();
}

/** Fit the field's height to its text, within the limits of the style. */
function fitQuestion() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  showComposer();
}

question.addEventListener("input", fitQuestion);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey) return;
  if (event.isComposing || event.keyCode === 229) return; // 229: Safari's Enter that ends a composition
  event.preventDefault();
  askDraft();
});
byId("composer", HTMLFormElement).addEventListener("submit", (event) => {
  event.preventDefault();
  askDraft();
});
addEventListener("pagehide", () => session.write("draft", question.value));
stop.addEventListener("click", () => {
  playground.stop();
  question.focus();
});
addEventListener("keydown", (event) => {
  if (event.isComposing || event.defaultPrevented) return; // handled by another element
  if (event.key === "Escape" && playground.isAsking) playground.stop();
});
byId("new-chat", HTMLButtonElement).addEventListener("click", () => {
  playground.newChat();
  question.focus();
});
compare.addEventListener("click", () => playground.addColumn());
probabilities.addEventListener("click", () => playground.showProbabilities(!playground.withTokens));
byId("columns", HTMLElement).addEventListener("click", (event) => {
  const button = event.target instanceof Element ? event.target.closest("button.copy") : null;
  const code = button?.closest("figure")?.querySelector("code");
  if (button instanceof HTMLButtonElement && code) void copyText(code.textContent ?? "", button);
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !playground.isAsking) void loadModels();
});

question.value = session.read("draft");
playground.show();
fitQuestion();
void loadModels();
question.focus();
