// Kinds of characters, entities and addresses in Markdown.

const SCHEMES = /^(?:https?:\/\/|mailto:)/i;
const ESCAPED = /\\([!-/:-@[-`{-~])|&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,31});/gi;

/** @type {Record<string, string>} Entities that answers contain; others stay unchanged. */
// prettier-ignore
const ENTITIES = {
  amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", reg: "®", trade: "™", deg: "°",
  hellip: "…", mdash: "—", ndash: "–", lsquo: "‘", rsquo: "’", ldquo: "“", rdquo: "”", laquo: "«", raquo: "»",
  bull: "•", middot: "·", times: "×", divide: "÷", plusmn: "±", minus: "−", le: "≤", ge: "≥", ne: "≠", asymp: "≈",
  larr: "←", rarr: "→", uarr: "↑", darr: "↓", harr: "↔", infin: "∞", sum: "∑", radic: "√", pi: "π", micro: "µ",
  euro: "€", pound: "£", yen: "¥", cent: "¢", sect: "§", para: "¶", frac12: "½", frac14: "¼", frac34: "¾",
  auml: "ä", ouml: "ö", uuml: "ü", Auml: "Ä", Ouml: "Ö", Uuml: "Ü", szlig: "ß", eacute: "é", egrave: "è",
};

/**
 * The character of an entity `&…;`; null for an unknown name.
 * @param {string} entity
 */
export function decodeEntity(entity) {
  const name = entity.slice(1, -1);
  if (!name.startsWith("#")) return Object.hasOwn(ENTITIES, name) ? /** @type {string} */ (ENTITIES[name]) : null;
  const code = /^#x/i.test(name) ? parseInt(name.slice(2), 16) : parseInt(name.slice(1), 10);
  const isCharacter = code > 0 && code <= 0x10ffff && !(code >= 0xd800 && code <= 0xdfff);
  return isCharacter ? String.fromCodePoint(code) : "\ufffd";
}

/**
 * Text with its backslash escapes and entities resolved.
 * @param {string} text
 */
export function unescapeText(text) {
  return text.replace(ESCAPED, (found, escaped) => escaped ?? decodeEntity(found) ?? found);
}

/**
 * An address that a link may have: http, https or mailto; null for others.
 * @param {string} address
 */
export function safeAddress(address) {
  return SCHEMES.test(address) ? address : null;
}

/** @param {string} character */
export function isSpace(character) {
  return /\s/u.test(character);
}

/** @param {string} character */
export function isPunctuation(character) {
  return /[\p{P}\p{S}]/u.test(character);
}

/** @param {string} character */
export function isCjk(character) {
  return /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}\u3000-\u303f\uff00-\uffef]/u.test(
    character,
  );
}

/**
 * Text without trailing characters that are among `characters`.
 * @param {string} text
 * @param {string} characters
 */
export function withoutEnd(text, characters) {
  let end = text.length;
  while (end > 0 && characters.includes(text.charAt(end - 1))) end -= 1;
  return text.slice(0, end);
}
