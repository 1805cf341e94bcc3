// The banner above the conversation, for states of the whole page: the server is gone, back, or needs a key.

import { byId, make } from "./elements.js";
import { t } from "./i18n.js";

/**
 * @typedef {object} BannerAction
 * @property {import("./i18n.js").Key} key
 * @property {() => void} act
 */

/** @type {() => void} Shows the banner again, in the current language. */
let again = () => undefined;

/**
 * @param {"good" | "bad"} kind
 * @param {() => string} sentence
 * @param {BannerAction[]} actions
 */
export function showBanner(kind, sentence, actions = []) {
  again = () => {
    const shown = byId("banner", HTMLElement);
    if (shown.dataset["sentence"] === sentence()) return; // not announced again; buttons keep the focus
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
