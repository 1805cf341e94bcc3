// Markdown to elements of the page. Creates only elements of a few kinds and text nodes, and never parses a string as
// markup, so a model's text is inert. Loads nothing: images are shown as links.

/** @import { Block, MarkElement, MarkNode } from "../types.js" */

import { parseBlocks } from "./markdown-blocks.js";
import { parseInline } from "./markdown-inline.js";
import { patch } from "./patch.js";

/**
 * The tree of a whole text.
 * @param {string} text
 * @param {string} copyLabel the label of the copy buttons of code
 * @returns {MarkNode[]}
 */
export function markdownTree(text, copyLabel) {
  return parseBlocks(text).map((block) => nodeOf(block, copyLabel));
}

/** A growing answer. Finished blocks stay unchanged, so that the cost of an update is that of the text after them. */
export class MarkdownView {
  /**
   * @param {Element} element its children are managed here only
   * @param {string} copyLabel
   */
  constructor(element, copyLabel) {
    this.element = element;
    this.copyLabel = copyLabel;
    this.text = "";
    /** The number of finished blocks, and the start of the text after them. */
    this.finished = 0;
    this.start = 0;
  }

  /** @param {string} text of the whole answer so far */
  update(text) {
    if (!text.startsWith(this.text)) this.finished = this.start = 0;
    const before = this.text.lastIndexOf("\n");
    this.text = text;
    const blocks = parseBlocks(text.slice(this.start));
    patch(
      this.element,
      blocks.map((block) => nodeOf(block, this.copyLabel)),
      this.finished,
    );
    if (text.lastIndexOf("\n") !== before) this.#finish(text.lastIndexOf("\n") + 1);
  }

  /**
   * A block is finished once another one begins after it in a complete line: no later line changes it.
   * @param {number} end of the last complete line
   */
  #finish(end) {
    const blocks = parseBlocks(this.text.slice(this.start, end));
    const last = blocks[blocks.length - 1];
    if (last === undefined) return;
    this.finished += blocks.length - 1;
    this.start += last.start;
  }
}

/**
 * @param {string} tag
 * @param {MarkNode[]} children
 * @param {Record<string, string>} attributes
 * @returns {MarkElement}
 */
function node(tag, children, attributes = {}) {
  return { tag, attributes, children };
}

/**
 * @param {Block} block
 * @param {string} copyLabel
 * @returns {MarkElement}
 */
function nodeOf(block, copyLabel) {
  const children = () => block.children.map((child) => nodeOf(child, copyLabel));
  switch (block.kind) {
    case "heading":
      return node(`h${block.level}`, parseInline(block.lines.join("\n").trimEnd()));
    case "rule":
      return node("hr", []);
    case "quote":
      return node("blockquote", children());
    case "list":
      return listOf(block, copyLabel);
    case "code":
      return codeOf(block, copyLabel);
    case "table":
      return tableOf(block);
    default:
      return node("p", parseInline(block.lines.join("\n")));
  }
}

/**
 * @param {Block} list
 * @param {string} copyLabel
 */
function listOf(list, copyLabel) {
  const isTight = !isLoose(list);
  const items = list.children.map((item) => {
    const children = item.children.flatMap((child) => {
      const shown = nodeOf(child, copyLabel);
      return isTight && child.kind === "paragraph" ? shown.children : [shown];
    });
    return node("li", children);
  });
  if (list.number === null) return node("ul", items);
  return node("ol", items, list.number === 1 ? {} : { start: String(list.number) });
}

/**
 * @param {Block} block
 * @param {string} copyLabel
 */
function codeOf(block, copyLabel) {
  const lines = [...block.lines];
  if (block.fence === "") while (/^[ \t]*$/.test(lines[lines.length - 1] ?? "x")) lines.pop();
  const code = node("code", [lines.map((line) => `${line}\n`).join("")]);
  const language = block.info.split(/[ \t]/, 1)[0] ?? "";
  const caption = [
    node("span", [language], { class: "language" }),
    node("button", [copyLabel], { class: "copy", type: "button" }),
  ];
  return node("figure", [node("figcaption", caption), node("pre", [code], { tabindex: "0" })], { class: "code" });
}

/** @param {Block} table */
function tableOf(table) {
  const rows = table.rows.map((cells, index) => {
    const shown = table.alignments.map((alignment, column) =>
      node(index === 0 ? "th" : "td", parseInline(cells[column] ?? ""), alignment === null ? {} : { class: alignment }),
    );
    return node("tr", shown);
  });
  const [head, ...body] = rows;
  const parts = [node("thead", head === undefined ? [] : [head])];
  if (body.length > 0) parts.push(node("tbody", body));
  return node("div", [node("table", parts)], { class: "table", tabindex: "0" });
}

/**
 * Whether blank lines separate a list's items or the blocks of an item: then its items are paragraphs.
 * @param {Block} list
 */
function isLoose(list) {
  return hasGap(list.children) || list.children.some((item) => hasGap(item.children));
}

/** @param {Block[]} blocks */
function hasGap(blocks) {
  return blocks.some((next, i) => i > 0 && next.firstLine - lastLineOf(/** @type {Block} */ (blocks[i - 1])) > 1);
}

/**
 * @param {Block} of
 * @returns {number}
 */
function lastLineOf(of) {
  const last = of.children[of.children.length - 1];
  return last === undefined || of.kind === "quote" ? of.lastLine : lastLineOf(last);
}
