// An answer for screen readers: its text without Markdown's marks, a line for each paragraph, item and row.

/** @import { MarkNode } from "../types.js" */

import { markdownTree } from "./markdown.js";

const LINES = new Set("blockquote div h1 h2 h3 h4 h5 h6 hr li p pre".split(" "));

/** @param {string} text */
export function spokenText(text) {
  const spoken = markdownTree(text, "").map(textOf).join("");
  return spoken.replace(/\s*\n\s*/g, "\n").trim();
}

/**
 * @param {MarkNode} node
 * @returns {string}
 */
function textOf(node) {
  if (typeof node === "string") return node;
  const { attributes, children, tag } = node;
  if (tag === "figcaption") return ""; // a language and a button
  if (tag === "tr") return `${children.map(textOf).join(", ")}\n`;
  if (tag === "ol") {
    const first = Number(attributes["start"] ?? 1);
    return children.map((item, i) => `\n${first + i}. ${textOf(item).trim()}\n`).join("");
  }
  const inner = children.map(textOf).join("");
  return LINES.has(tag) ? `\n${inner}\n` : inner;
}
