// One line above the conversation, for what concerns the whole page: the server is gone, back, or wants a key.

import { byId, make } from "./elements.js";
import { t } from "./i18n.js";

/**
 * @typedef {object} BannerAction
 * @property {import("./i18n.js").Key} key
 * @property {() => void} act
 */

/** @type {() => void} Shows the banner again, in the language of the moment. */
let again = () => undefined;

/**
 * @param {"good" | "bad"} kind
 * @param {() => string} sentence
 * @param {BannerAction[]} actions
 */
export function showBanner(kind, sentence, actions = []) {
  again = () => {
    const shown = byId("banner", HTMLElement);
    if (shown.dataset["sentence"] === sentence()) return; // it would be read out again, and its buttons lose the focus
    shown.dataset["sentence"] = sentence();
    const buttons = actions.map(({ key, act }) => make("button", { type: "button", click: act }, t(key)));
    const text = make("p", {}, sentence());
    shown.replaceChildren(make("div", { class: `banner ${kind}` }, text, ...buttons));
  };
  again();
}

export function hideBanner() {
  again = () => undefined;
  const shown = byId("banner", HTMLElement);
  delete shown.dataset["sentence"];
  shown.replaceChildren();
}

export function translateBanner() {
  again();
}
