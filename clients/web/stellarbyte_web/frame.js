// The frame of all pages: language, theme, key, and the server's state.

/** @import { Language } from "./i18n.js" */

import { byId, make } from "./elements.js";
import { currentLanguage, preferredLanguage, setLanguage, t, translate } from "./i18n.js";
import { lasting, session } from "./storage.js";

/** @typedef {"connecting" | "ready" | "notReady" | "notReachable" | "needsKey"} Condition */

/** @type {Condition} */
let condition = "connecting";

/**
 * @param {() => void} languageChanged called after the marked elements of the page have been translated
 */
export function startFrame(languageChanged) {
  const select = byId("language", HTMLSelectElement);
  const apply = (/** @type {Language} */ language) => {
    setLanguage(language);
    select.value = language;
    translate(document);
    showTheme();
    showCondition(condition);
  };
  apply(preferredLanguage());
  select.addEventListener("change", () => {
    const chosen = select.value === "zh" ? "zh" : "en";
    lasting.write("language", chosen);
    apply(chosen);
    languageChanged();
  });
  byId("theme", HTMLButtonElement).addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset["theme"] = theme;
    lasting.write("theme", theme);
    showTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
}

function isDark() {
  const chosen = document.documentElement.dataset["theme"];
  return chosen === undefined ? matchMedia("(prefers-color-scheme: dark)").matches : chosen === "dark";
}

function showTheme() {
  const button = byId("theme", HTMLButtonElement);
  button.title = t(isDark() ? "useLightTheme" : "useDarkTheme");
  button.setAttribute("aria-label", button.title);
}

/**
 * Show the server's state in the bar.
 * @param {Condition} now
 */
export function showCondition(now) {
  condition = now;
  const pill = byId("connection", HTMLElement);
  if (pill.dataset["condition"] === now && pill.lang === currentLanguage()) return;
  pill.dataset["condition"] = now;
  pill.lang = currentLanguage();
  pill.title = t(now); // for phones, which have no room for the word
  pill.replaceChildren(make("span", { class: "dot" }), t(now));
}

/**
 * Set up a field for a key, which is kept until the tab is closed.
 * @param {string} id of the field; its problem is shown at `ID-problem`
 * @param {string} name of the key in the storage
 * @param {() => void} changed
 */
export function startKeyField(id, name, changed) {
  const field = byId(id, HTMLInputElement);
  const problem = byId(`${id}-problem`, HTMLElement);
  field.value = session.read(name);
  field.addEventListener("change", () => {
    const key = field.value.trim();
    const isValid = /^[\x21-\x7e]*$/.test(key); // characters allowed in a header
    field.setAttribute("aria-invalid", String(!isValid));
    problem.textContent = isValid ? "" : t("keyNotAscii");
    session.write(name, isValid ? key : "");
    changed();
  });
}

/** @param {string} name */
export function keptKey(name) {
  return session.read(name);
}
