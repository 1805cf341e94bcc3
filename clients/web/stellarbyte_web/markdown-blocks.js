// Markdown's block structure: lines to a tree of paragraphs, lists, quotes, tables and code. Follows CommonMark without
// raw HTML and link reference definitions, with GitHub's tables.
//
// One pass over the lines with a stack of open blocks, so the time is bounded by lines × MAX_DEPTH for any text.

/** @import { Block } from "../types.js" */

import { LineCursor } from "./line-cursor.js";
import { FENCE, HEADING, MARKER, RULE, UNDERLINE, closesFence, withoutClosingMarks } from "./markdown-lines.js";
import { alignmentsOf, cellsOf } from "./markdown-table.js";
import { unescapeText } from "./markdown-text.js";

const MAX_DEPTH = 32; // of nested quotes and list items; deeper ones are text

/**
 * The blocks of a text. Each block of the outermost level has the index of its first line's first character, from
 * which the text can be parsed again separately.
 * @param {string} text
 * @returns {Block[]}
 */
export function parseBlocks(text) {
  const parser = new BlockParser();
  let start = 0;
  while (start < text.length) {
    let end = text.indexOf("\n", start);
    if (end < 0) end = text.length;
    const line = text.slice(start, text[end - 1] === "\r" ? end - 1 : end);
    parser.addLine(line, start);
    start = end + 1;
  }
  return parser.finish();
}

class BlockParser {
  constructor() {
    /** @type {Block} */
    this.document = block("document", 0, 0);
    /** @type {Block[]} Open blocks from the outermost to the innermost. */
    this.stack = [this.document];
    this.lineNumber = 0;
    this.lineStart = 0;
    this.previousStart = 0;
  }

  get tip() {
    return /** @type {Block} */ (this.stack[this.stack.length - 1]);
  }

  /**
   * @param {string} text without its line end
   * @param {number} start index of its first character in the whole text
   */
  addLine(text, start) {
    this.lineNumber += 1;
    this.previousStart = this.lineStart;
    this.lineStart = start;
    const cursor = new LineCursor(text);
    const depth = this.#matchOpenBlocks(cursor);
    if (depth === null) return; // the line closed a fence
    const matched = /** @type {Block} */ (this.stack[depth - 1]);
    if (matched.kind === "code") {
      this.#addCode(matched, cursor);
      return;
    }
    let hasStarted = false;
    for (
      let started = this.#startBlock(cursor, depth);
      started;
      started = this.#startBlock(cursor, this.stack.length)
    ) {
      if (started === "leaf") return; // it took the rest of the line
      hasStarted = true;
    }
    if (!hasStarted && depth < this.stack.length && this.tip.kind === "paragraph" && !cursor.isBlank) {
      this.tip.lines.push(cursor.trimmed); // a lazy line: the paragraph continues although its quote or item does not
      this.tip.lastLine = this.lineNumber;
      return;
    }
    if (!hasStarted) this.stack.length = depth;
    if (cursor.isBlank) return;
    const tip = this.tip;
    if (tip.kind === "paragraph") {
      tip.lines.push(cursor.trimmed);
      tip.lastLine = this.lineNumber;
    } else if (tip.kind === "table") {
      tip.rows.push(cellsOf(cursor.trimmed));
      tip.lastLine = this.lineNumber;
    } else {
      this.#open("paragraph").lines.push(cursor.trimmed);
    }
  }

  finish() {
    return this.document.children;
  }

  /**
   * The number of open blocks that continue in this line, after consuming their marks; null if the line ends a fence.
   * @param {LineCursor} cursor
   */
  #matchOpenBlocks(cursor) {
    for (let depth = 1; depth < this.stack.length; depth += 1) {
      const open = /** @type {Block} */ (this.stack[depth]);
      if (open.kind === "quote") {
        if (!takeQuoteMark(cursor)) return depth;
        open.lastLine = this.lineNumber;
      } else if (open.kind === "item") {
        const isEmpty = open.children.length === 0;
        if (cursor.isBlank ? isEmpty : cursor.indent < open.indent) return depth;
        cursor.skipColumns(open.indent);
      } else if (open.kind === "code" && open.fence !== "") {
        if (cursor.indent < 4 && closesFence(cursor.trimmed, open.fence)) {
          open.lastLine = this.lineNumber;
          this.stack.length = depth;
          return null;
        }
        cursor.skipColumns(Math.min(cursor.indent, open.indent));
      } else if (open.kind === "code") {
        if (!cursor.isBlank && cursor.indent < 4) return depth;
        cursor.skipColumns(4);
      } else if (open.kind !== "list" && cursor.isBlank) {
        return depth;
      }
    }
    return this.stack.length;
  }

  /**
   * @param {Block} code
   * @param {LineCursor} cursor
   */
  #addCode(code, cursor) {
    code.lines.push(cursor.rest);
    if (code.fence !== "" || !cursor.isBlank) code.lastLine = this.lineNumber;
  }

  /**
   * Start a block inside the first `depth` open ones, if the line begins one. A container consumes its mark.
   * @param {LineCursor} cursor
   * @param {number} depth
   * @returns {"leaf" | "container" | null}
   */
  #startBlock(cursor, depth) {
    const within = /** @type {Block} */ (this.stack[depth - 1]);
    if (cursor.isBlank) return null;
    if (cursor.indent >= 4) {
      if (within.kind === "table" || this.tip.kind === "paragraph") return null;
      this.stack.length = depth;
      cursor.skipColumns(4);
      this.#addCode(this.#open("code"), cursor);
      return "leaf";
    }
    const line = cursor.trimmed;
    if (line.startsWith(">") && depth < MAX_DEPTH) {
      this.#leaveTo(depth);
      takeQuoteMark(cursor);
      this.#open("quote");
      return "container";
    }
    if (this.#startLeaf(cursor, depth, line)) return "leaf";
    return this.#startItem(cursor, depth, line) ? "container" : null;
  }

  /**
   * @param {LineCursor} cursor
   * @param {number} depth
   * @param {string} line
   */
  #startLeaf(cursor, depth, line) {
    const within = /** @type {Block} */ (this.stack[depth - 1]);
    const heading = HEADING.exec(line);
    if (heading) {
      this.#leaveTo(depth);
      const opened = this.#open("heading");
      opened.level = /** @type {string} */ (heading[1]).length;
      opened.lines.push(withoutClosingMarks(heading[2] ?? ""));
      this.stack.pop();
      return true;
    }
    const fence = FENCE.exec(line);
    if (fence) {
      this.#leaveTo(depth);
      const opened = this.#open("code");
      opened.fence = /** @type {string} */ (fence[1] ?? fence[3]);
      opened.info = unescapeText((fence[2] ?? fence[4] ?? "").trim());
      opened.indent = cursor.indent;
      return true;
    }
    const underline = within.kind === "paragraph" ? UNDERLINE.exec(line) : null;
    if (underline) {
      within.kind = "heading";
      within.level = line.startsWith("=") ? 1 : 2;
      within.lastLine = this.lineNumber;
      this.stack.length = depth - 1;
      return true;
    }
    if (within.kind === "paragraph" && this.#startTable(within, depth, line)) return true;
    if (!RULE.test(line)) return false;
    this.#leaveTo(depth);
    this.#open("rule");
    this.stack.pop();
    return true;
  }

  /**
   * A line of dashes and bars turns the paragraph's last line into a table, if both have the same number of cells.
   * @param {Block} paragraph
   * @param {number} depth
   * @param {string} line
   */
  #startTable(paragraph, depth, line) {
    const alignments = alignmentsOf(line);
    const head = cellsOf(/** @type {string} */ (paragraph.lines[paragraph.lines.length - 1]));
    if (alignments === null || head.length !== alignments.length) return false;
    paragraph.lines.pop();
    this.stack.length = depth - 1;
    if (paragraph.lines.length === 0) this.tip.children.pop();
    const table = this.#open("table");
    table.start = this.previousStart;
    table.firstLine = this.lineNumber - 1;
    table.alignments = alignments;
    table.rows.push(head);
    return true;
  }

  /**
   * @param {LineCursor} cursor
   * @param {number} depth
   * @param {string} line
   */
  #startItem(cursor, depth, line) {
    const marker = MARKER.exec(line);
    if (!marker || depth + 1 >= MAX_DEPTH) return false;
    const within = /** @type {Block} */ (this.stack[depth - 1]);
    const number = marker[2] === undefined ? null : Number(marker[2]);
    const isEmpty = line.slice(marker[0].length).trim() === "";
    if (within.kind === "paragraph" && (isEmpty || (number !== null && number !== 1))) return false;
    const marginColumns = cursor.indent;
    this.#leaveTo(depth);
    cursor.skipColumns(marginColumns);
    cursor.skipCharacters(marker[0].length);
    const gap = isEmpty || cursor.indent > 4 ? 1 : cursor.indent;
    cursor.skipColumns(gap);
    const delimiter = marker[1] ?? /** @type {string} */ (marker[3]);
    if (this.tip.kind !== "list" || this.tip.delimiter !== delimiter) {
      if (this.tip.kind === "list") this.stack.pop();
      const list = this.#open("list");
      list.delimiter = delimiter;
      list.number = number;
    }
    this.#open("item").indent = marginColumns + marker[0].length + gap;
    return true;
  }

  /**
   * Close the open blocks beyond `depth`, and a paragraph or table there, because the next block follows it.
   * @param {number} depth
   */
  #leaveTo(depth) {
    this.stack.length = depth;
    if (this.tip.kind === "paragraph" || this.tip.kind === "table") this.stack.pop();
  }

  /**
   * Open a block inside the innermost open one. A list contains only items, so other blocks close it.
   * @param {Block["kind"]} kind
   */
  #open(kind) {
    if (this.tip.kind === "list" && kind !== "item") this.stack.pop();
    const opened = block(kind, this.lineStart, this.lineNumber);
    this.tip.children.push(opened);
    this.stack.push(opened);
    return opened;
  }
}

/**
 * @param {Block["kind"]} kind
 * @param {number} start
 * @param {number} line
 * @returns {Block}
 */
function block(kind, start, line) {
  // prettier-ignore
  return {
    kind, start, firstLine: line, lastLine: line, children: [], lines: [], rows: [], alignments: [],
    level: 0, indent: 0, fence: "", info: "", delimiter: "", number: null,
  };
}

/** @param {LineCursor} cursor */
function takeQuoteMark(cursor) {
  if (cursor.indent >= 4 || !cursor.trimmed.startsWith(">")) return false;
  cursor.skipColumns(cursor.indent);
  cursor.skipCharacters(1);
  if (cursor.indent > 0) cursor.skipColumns(1);
  return true;
}
