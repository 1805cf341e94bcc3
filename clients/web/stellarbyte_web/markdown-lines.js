// Parses single lines of Markdown, without their indentation.

import { withoutEnd } from "./markdown-text.js";

export const FENCE = /^(?:(`{3,})([^`]*)|(~{3,})(.*))$/;
export const HEADING = /^(#{1,6})(?:[ \t]+|$)(.*)$/;
export const RULE = /^(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
export const UNDERLINE = /^(=+|-+)[ \t]*$/;
export const MARKER = /^(?:([-+*])|(\d{1,9})([.)]))(?=[ \t]|$)/;

/**
 * A heading's text: `# Title ##` is the same as `# Title`.
 * @param {string} text
 */
export function withoutClosingMarks(text) {
  const trimmed = withoutEnd(text, " \t");
  const bare = withoutEnd(trimmed, "#");
  return bare === "" || /[ \t]$/.test(bare) ? bare.trim() : trimmed;
}

/**
 * Whether a line ends code that began with this fence.
 * @param {string} line
 * @param {string} fence
 */
export function closesFence(line, fence) {
  const run = /^(`+|~+)[ \t]*$/.exec(line)?.[1];
  return run !== undefined && run[0] === fence[0] && run.length >= fence.length;
}
