// An answer as its tokens, coloured by their probability; a card shows the alternatives of one token. By pointer, touch
// or keyboard: the list is one tab stop, and arrow keys move from token to token.

/** @import { TokenLogprob } from "../types.js" */

import { byId, make } from "./elements.js";
import { formatNumber, t } from "./i18n.js";
import { tokenTexts } from "./token-text.js";

let lists = 0; // number of lists created, for ids

export class TokenView {
  constructor() {
    lists += 1;
    this.id = `tokens-${lists}`;
    /** @type {TokenLogprob[]} */
    this.tokens = [];
    this.texts = tokenTexts();
    this.active = -1;
    this.element = make("div", {
      class: "tokens",
      role: "listbox",
      tabindex: "0",
      "aria-label": t("tokensOfAnswer"),
      keydown: (/** @type {KeyboardEvent} */ event) => this.#onKey(event),
      focus: () => this.#show(Math.max(0, this.active)),
      blur: () => this.#hide(),
      pointerover: (/** @type {PointerEvent} */ event) => this.#onPointer(event),
      click: (/** @type {PointerEvent} */ event) => this.#onPointer(event),
      pointerleave: () => this.#hide(),
    });
  }

  /** @param {TokenLogprob[]} tokens all of the answer so far */
  update(tokens) {
    for (const token of tokens.slice(this.tokens.length)) {
      const shown = this.texts(token);
      const element = make(
        "span",
        {
          class: `token chance-${Math.min(9, Math.floor(chanceOf(token.logprob) * 10))}`,
          role: "option",
          id: `${this.id}-${this.tokens.length}`,
          "aria-label": labelOf(token, shown),
        },
        shown.replaceAll("\n", "↵\n"),
      );
      this.tokens.push(token);
      this.element.append(element);
    }
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    const last = this.tokens.length - 1;
    const targets = /** @type {Record<string, number>} */ ({
      ArrowRight: this.active + 1,
      ArrowDown: this.active + 1,
      ArrowLeft: this.active - 1,
      ArrowUp: this.active - 1,
      Home: 0,
      End: last,
    });
    const target = targets[event.key];
    if (target === undefined) return;
    event.preventDefault();
    const index = Math.min(last, Math.max(0, target));
    this.element.children[index]?.scrollIntoView({ block: "nearest" });
    this.#show(index);
  }

  /** @param {PointerEvent} event */
  #onPointer(event) {
    const index = event.target instanceof Element ? [...this.element.children].indexOf(event.target) : -1;
    if (index >= 0) this.#show(index);
  }

  /** @param {number} index */
  #show(index) {
    const token = this.tokens[index];
    const element = this.element.children[index];
    if (token === undefined || element === undefined) return;
    this.element.children[this.active]?.classList.remove("active");
    this.active = index;
    element.classList.add("active");
    this.element.setAttribute("aria-activedescendant", element.id);
    showCard(token, element);
  }

  #hide() {
    if (document.activeElement !== this.element) hideTokenCard();
  }
}

/** The token of the card. */
let beside = /** @type {Element | null} */ (null);

/** Hide the card when its token has gone or moved. */
export function hideTokenCard() {
  beside?.classList.remove("active");
  beside = null;
  byId("token-card", HTMLElement).hidden = true;
}

document.addEventListener(
  "scroll",
  () => {
    if (beside === null) return;
    if (beside.parentElement === document.activeElement) placeCard(beside);
    else hideTokenCard();
  },
  { capture: true, passive: true },
);

/**
 * @param {TokenLogprob} token
 * @param {Element} element
 */
function showCard(token, element) {
  const card = byId("token-card", HTMLElement);
  const rows = [token, ...othersOf(token)]
    .sort((a, b) => b.logprob - a.logprob)
    .map((row) => cardRow(row, row === token));
  card.replaceChildren(make("p", { class: "card-title" }, t("alternatives")), ...rows);
  card.hidden = false;
  beside = element;
  placeCard(element);
}

/** @param {Element} element */
function placeCard(element) {
  const card = byId("token-card", HTMLElement);
  const place = element.getBoundingClientRect();
  const { offsetWidth, offsetHeight } = card;
  const below = place.bottom + 6;
  const top = below + offsetHeight > innerHeight ? place.top - 6 - offsetHeight : below;
  card.style.top = `${Math.max(4, top)}px`;
  card.style.left = `${Math.max(4, Math.min(place.left, innerWidth - offsetWidth - 4))}px`;
}

/** @param {TokenLogprob} token */
function othersOf(token) {
  return token.top_logprobs.filter((other) => identityOf(other) !== identityOf(token));
}

/**
 * The content of the card for screen readers.
 * @param {TokenLogprob} token
 * @param {string} shown
 */
function labelOf(token, shown) {
  const name = (/** @type {string} */ text) => text.trim() || JSON.stringify(text);
  const others = othersOf(token).map((other) => `${name(other.token)} ${percent(other.logprob)}`);
  const values = { token: shown.trim() || name(token.token), probability: percent(token.logprob) };
  if (others.length === 0) return t("tokenLabel", values);
  return t("tokenLabelWith", { ...values, alternatives: others.join(", ") });
}

/**
 * Parts of characters all have the same text, so they are identified by their bytes.
 * @param {import("../types.js").TopLogprob} token
 */
function identityOf({ token, bytes }) {
  return bytes === null ? token : String(bytes);
}

/**
 * @param {{ token: string, logprob: number }} row
 * @param {boolean} isChosen
 */
function cardRow(row, isChosen) {
  const bar = make("span", { class: "card-bar" });
  bar.style.width = `${chanceOf(row.logprob) * 100}%`;
  return make(
    "div",
    { class: isChosen ? "card-row chosen" : "card-row" },
    make("code", {}, JSON.stringify(row.token).slice(1, -1).replace(/^ | $/g, "␣")),
    make("span", { class: "card-track" }, bar),
    make("span", { class: "card-value" }, percent(row.logprob)),
  );
}

/** @param {number} logprob */
function chanceOf(logprob) {
  return Math.min(1, Math.exp(logprob));
}

/** @param {number} logprob */
function percent(logprob) {
  return formatNumber(chanceOf(logprob), { style: "percent", maximumFractionDigits: 1 });
}
