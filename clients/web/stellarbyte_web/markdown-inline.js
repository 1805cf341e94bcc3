// Markdown inside a block: emphasis, code, links, breaks. Text to a tree of elements and text.
// Follows CommonMark without raw HTML and reference links; with strikethrough, bare web addresses, and emphasis next
// to Chinese, Japanese and Korean text, which has no spaces around it. Images become links: nothing is ever loaded.

/** @import { Delimiter, MarkElement, MarkNode, Piece } from "../types.js" */

import { decodeEntity, isCjk, isPunctuation, isSpace, safeAddress, withoutEnd } from "./markdown-text.js";
import { resolveEmphasis, treeOf } from "./markdown-emphasis.js";
import { readDestination } from "./markdown-link.js";

const PLAIN = /(?:[^\\`*_~[\]!<&\nh]|h(?!ttps?:\/\/))+/y;
const AUTOLINK = /<([a-z][a-z0-9+.-]{1,31}:[^\s<>]{0,2000})>/iy;
const MAIL = /<([\w.!#$%&'*+/=?^`{|}~-]{1,64}@[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){0,9})>/iy;
const BARE_ADDRESS = /https?:\/\/[^\s<>[\]"'`*|\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]{1,2000}/y;
const TICKS = /`+/g;

/**
 * @param {string} text lines without leading white space
 * @returns {MarkNode[]}
 */
export function parseInline(text) {
  return new InlineParser(text).parse();
}

class InlineParser {
  /** @param {string} text */
  constructor(text) {
    this.text = withoutEnd(text, " \t");
    this.position = 0;
    /** @type {Piece[]} */
    this.pieces = [];
    /** @type {{ piece: number, isImage: boolean, isActive: boolean }[]} Brackets that may begin a link. */
    this.brackets = [];
    /** @type {Map<number, number[]> | null} Where runs of backticks of each length begin. */
    this.tickRuns = null;
  }

  parse() {
    while (this.position < this.text.length) this.#readPiece();
    return treeOf(resolveEmphasis(this.pieces));
  }

  #readPiece() {
    const { text, position } = this;
    const plain = match(PLAIN, text, position);
    if (plain !== null) return this.#add(plain[0], plain[0].length);
    switch (text[position]) {
      case "\\":
        return this.#readEscape();
      case "`":
        return this.#readCode();
      case "*":
      case "_":
      case "~":
        return this.#readDelimiters();
      case "[":
        return this.#openBracket(false);
      case "]":
        return this.#closeBracket();
      case "!":
        return text[position + 1] === "[" ? this.#openBracket(true) : this.#add("!", 1);
      case "<":
        return this.#readAutolink();
      case "&":
        return this.#readEntity();
      case "\n":
        return this.#readBreak();
      default:
        return this.#readBareAddress();
    }
  }

  /**
   * @param {Piece} piece
   * @param {number} length characters of the text that it replaces
   */
  #add(piece, length) {
    this.pieces.push(piece);
    this.position += length;
  }

  #readEscape() {
    const next = this.text[this.position + 1] ?? "";
    if (next === "\n") {
      this.#add({ tag: "br", attributes: {}, children: [] }, 2);
      this.#add("\n", 0);
    } else if (/[!-/:-@[-`{-~]/.test(next)) {
      this.#add(next, 2);
    } else {
      this.#add("\\", 1);
    }
  }

  #readCode() {
    if (this.tickRuns === null) {
      this.tickRuns = new Map();
      for (const run of this.text.matchAll(TICKS)) {
        const starts = this.tickRuns.get(run[0].length) ?? [];
        this.tickRuns.set(run[0].length, starts);
        starts.push(run.index);
      }
    }
    const { length } = /** @type {RegExpExecArray} */ (match(/`+/y, this.text, this.position))[0];
    const starts = this.tickRuns.get(length) ?? [];
    while (starts.length > 0 && /** @type {number} */ (starts[0]) <= this.position) starts.shift();
    const end = starts[0];
    if (end === undefined) return this.#add("`".repeat(length), length);
    let code = this.text.slice(this.position + length, end).replace(/\n/g, " ");
    if (/^ .* $/.test(code) && code.trim() !== "") code = code.slice(1, -1);
    this.#add({ tag: "code", attributes: {}, children: [code] }, end + length - this.position);
  }

  #readDelimiters() {
    const character = /** @type {Delimiter["character"]} */ (this.text[this.position]);
    let end = this.position;
    while (this.text[end] === character) end += 1;
    const count = end - this.position;
    if (character === "~" && count !== 2) return this.#add("~".repeat(count), count);
    const before = characterBefore(this.text, this.position);
    const after = String.fromCodePoint(this.text.codePointAt(end) ?? 32);
    const opens =
      !isSpace(after) && (!isPunctuation(after) || isSpace(before) || isPunctuation(before) || isCjk(before));
    const closes =
      !isSpace(before) && (!isPunctuation(before) || isSpace(after) || isPunctuation(after) || isCjk(after));
    const isUnderscore = character === "_"; // which has no effect inside a word
    this.#add(
      {
        character,
        count,
        length: count,
        canOpen: opens && (!isUnderscore || !closes || isPunctuation(before)),
        canClose: closes && (!isUnderscore || !opens || isPunctuation(after)),
        closing: [],
        opening: [],
      },
      count,
    );
  }

  /** @param {boolean} isImage */
  #openBracket(isImage) {
    this.brackets.push({ piece: this.pieces.length, isImage, isActive: true });
    this.#add(isImage ? "![" : "[", isImage ? 2 : 1);
  }

  #closeBracket() {
    const bracket = this.brackets.pop();
    if (bracket === undefined || !bracket.isActive) return this.#add("]", 1);
    const destination = readDestination(this.text, this.position + 1);
    const address = destination === null ? null : safeAddress(destination.address);
    if (destination === null || address === null) return this.#add("]", 1);
    const inner = treeOf(resolveEmphasis(this.pieces.slice(bracket.piece + 1)));
    this.pieces.length = bracket.piece;
    const children = bracket.isImage ? [textOf(inner)] : inner.flatMap(withoutLinks);
    this.#add(link(address, children), destination.end - this.position);
    if (!bracket.isImage) for (const open of this.brackets) if (!open.isImage) open.isActive = false;
  }

  #readAutolink() {
    const address = match(AUTOLINK, this.text, this.position) ?? match(MAIL, this.text, this.position);
    if (address === null) return this.#add("<", 1);
    const shown = /** @type {string} */ (address[1]);
    const safe = safeAddress(shown.includes(":") ? shown : `mailto:${shown}`);
    this.#add(safe === null ? address[0] : link(safe, [shown]), address[0].length);
  }

  #readBareAddress() {
    const before = characterBefore(this.text, this.position);
    const isInWord = /[\p{L}\p{N}]/u.test(before) && !isCjk(before);
    const found = isInWord ? null : match(BARE_ADDRESS, this.text, this.position);
    if (found === null) return this.#add("h", 1);
    let address = found[0].replace(/[?!.,:_~;]+$/, "");
    while (address.endsWith(")") && count(address, ")") > count(address, "(")) address = address.slice(0, -1);
    this.#add(link(address, [address]), address.length);
  }

  #readEntity() {
    const entity = match(/&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,31});/iy, this.text, this.position);
    const decoded = entity === null ? null : decodeEntity(entity[0]);
    if (entity === null || decoded === null) this.#add("&", 1);
    else this.#add(decoded, entity[0].length);
  }

  #readBreak() {
    const last = this.pieces[this.pieces.length - 1];
    if (typeof last === "string") {
      const trimmed = withoutEnd(last, " ");
      this.pieces[this.pieces.length - 1] = trimmed;
      if (last.length - trimmed.length >= 2) this.#add({ tag: "br", attributes: {}, children: [] }, 0);
    }
    this.#add("\n", 1);
  }
}

/**
 * @param {RegExp} pattern sticky
 * @param {string} text
 * @param {number} position
 */
function match(pattern, text, position) {
  pattern.lastIndex = position;
  return pattern.exec(text);
}

/**
 * @param {string} text
 * @param {number} position
 */
function characterBefore(text, position) {
  if (position === 0) return " ";
  const isPair = position > 1 && /[\udc00-\udfff]/.test(/** @type {string} */ (text[position - 1]));
  return text.slice(position - (isPair ? 2 : 1), position);
}

/**
 * @param {string} text
 * @param {string} character
 */
function count(text, character) {
  return text.split(character).length - 1;
}

/**
 * A link that opens in a new tab, without access to this page or its address.
 * @param {string} address
 * @param {MarkNode[]} children
 * @returns {MarkElement}
 */
function link(address, children) {
  return { tag: "a", attributes: { href: address, rel: "noopener noreferrer", target: "_blank" }, children };
}

/**
 * Replaces links by their content, because links cannot be nested.
 * @param {MarkNode} node
 * @returns {MarkNode[]}
 */
function withoutLinks(node) {
  if (typeof node === "string") return [node];
  const children = node.children.flatMap(withoutLinks);
  return node.tag === "a" ? children : [{ ...node, children }];
}

/**
 * @param {MarkNode[]} nodes
 * @returns {string}
 */
export function textOf(nodes) {
  return nodes.map((node) => (typeof node === "string" ? node : textOf(node.children))).join("");
}
