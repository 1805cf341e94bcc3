// The language of the pages, and their texts in it.

import { chinese } from "./chinese.js";
import { english } from "./english.js";
import { lasting } from "./storage.js";

/** @typedef {keyof typeof english} Key */

const TABLES = { en: english, zh: chinese };
const TAGS = { en: "en", zh: "zh-CN" };

/** @typedef {keyof typeof TABLES} Language */

/** @type {Language} */
let language = "en";

/**
 * The language chosen before, else the browser's.
 * @returns {Language}
 */
export function preferredLanguage() {
  const wanted = lasting.read("language") || navigator.language;
  return wanted.toLowerCase().startsWith("zh") ? "zh" : "en";
}

/** @param {Language} chosen */
export function setLanguage(chosen) {
  language = chosen;
  document.documentElement.lang = TAGS[chosen];
}

export function currentLanguage() {
  return language;
}

/**
 * A text in the current language, with its {places} filled.
 * @param {Key} key
 * @param {Record<string, string | number>} values
 */
export function t(key, values = {}) {
  return TABLES[language][key].replace(/\{(\w+)\}/g, (place, name) => String(values[name] ?? place));
}

/**
 * @param {number} value
 * @param {Intl.NumberFormatOptions} options
 */
export function formatNumber(value, options = {}) {
  return new Intl.NumberFormat(TAGS[language], options).format(value);
}

/** @param {number} unixS */
export function formatTime(unixS) {
  return new Intl.DateTimeFormat(TAGS[language], { dateStyle: "short", timeStyle: "short" }).format(unixS * 1000);
}

/** @param {number} bytes */
export function formatBytes(bytes) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  let value = bytes;
  for (; value >= 1024 && unit < units.length - 1; unit += 1) value /= 1024;
  return `${formatNumber(value, { maximumFractionDigits: value < 10 && unit > 0 ? 1 : 0 })} ${units[unit]}`;
}

/**
 * Translate marked elements: data-i18n is an element's text, data-i18n-NAME its attribute NAME.
 * @param {ParentNode} root
 */
export function translate(root) {
  for (const element of root.querySelectorAll("[data-i18n]")) {
    element.textContent = t(/** @type {Key} */ (element.getAttribute("data-i18n")));
  }
  for (const name of ["aria-label", "title", "placeholder"]) {
    for (const element of root.querySelectorAll(`[data-i18n-${name}]`)) {
      element.setAttribute(name, t(/** @type {Key} */ (element.getAttribute(`data-i18n-${name}`))));
    }
  }
}
