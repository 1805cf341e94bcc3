// Parses the part after a link's text: (address "title").

import { unescapeText } from "./markdown-text.js";

const MAX_LENGTH = 2000; // of an address; also bounds the time per bracket
const MAX_PARENTHESES = 32;
const TITLE = /[ \t\n]+(?:"(?:\\.|[^"\\]){0,500}"|'(?:\\.|[^'\\]){0,500}'|\((?:\\.|[^()\\]){0,500}\))/sy;
const SPACE = /[ \t]*\n?[ \t]*/y;

/**
 * The address that begins at `position`, and the end of its parentheses; null if there is none. Titles are dropped.
 * @param {string} text
 * @param {number} position
 * @returns {{ address: string, end: number } | null}
 */
export function readDestination(text, position) {
  if (text[position] !== "(") return null;
  let end = skip(SPACE, text, position + 1);
  const start = end;
  let address;
  if (text[end] === "<") {
    end = endOfBracketed(text, end);
    if (end < 0) return null;
    address = text.slice(start + 1, end - 1);
  } else {
    end = endOfPlain(text, end);
    address = text.slice(start, end);
  }
  end = skip(TITLE, text, end);
  end = skip(SPACE, text, end);
  return text[end] === ")" ? { address: unescapeText(address), end: end + 1 } : null;
}

/**
 * @param {RegExp} pattern sticky
 * @param {string} text
 * @param {number} position
 */
function skip(pattern, text, position) {
  pattern.lastIndex = position;
  return position + (pattern.exec(text)?.[0].length ?? 0);
}

/**
 * @param {string} text
 * @param {number} start
 */
function endOfBracketed(text, start) {
  for (let i = start + 1; i < text.length && i < start + MAX_LENGTH; i += 1) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === ">") return i + 1;
    else if (text[i] === "<" || text[i] === "\n") return -1;
  }
  return -1;
}

/**
 * @param {string} text
 * @param {number} start
 */
function endOfPlain(text, start) {
  let depth = 0;
  let i = start;
  for (; i < text.length && i < start + MAX_LENGTH; i += 1) {
    const character = /** @type {string} */ (text[i]);
    if (character === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) i += 1;
    else if (character <= " ") break;
    else if (character === "(" && (depth += 1) > MAX_PARENTHESES) break;
    else if (character === ")" && (depth -= 1) < 0) break;
  }
  return i;
}
