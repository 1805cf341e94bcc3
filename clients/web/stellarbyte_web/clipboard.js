// Copies text, also on pages loaded by plain HTTP from another machine, and confirms it on the button.

import { icon } from "./elements.js";
import { t } from "./i18n.js";

const SHOWN_MS = 1500;

/**
 * @param {string} text
 * @param {HTMLElement} button confirms the copy for a moment
 */
export async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    if (!copyBySelection(text)) return;
  }
  if (button.classList.contains("done")) return; // already confirmed
  const before = [...button.childNodes];
  const hasIcon = button.querySelector("svg") !== null;
  button.replaceChildren(hasIcon ? icon("check") : t("copied"));
  button.classList.add("done");
  setTimeout(() => {
    button.replaceChildren(...before);
    button.classList.remove("done");
  }, SHOWN_MS);
}

/** @param {string} text */
function copyBySelection(text) {
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "unseen";
  document.body.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  return isDone;
}
