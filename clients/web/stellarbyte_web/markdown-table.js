// The rows of a Markdown table: cells between bars.

/** @import { Alignment } from "../types.js" */

/**
 * The cells of a row. A bar after a backslash belongs to its cell.
 * @param {string} line
 */
export function cellsOf(line) {
  const cells = [];
  let cell = "";
  for (let i = 0; i < line.length; i += 1) {
    if (line[i] === "\\" && line[i + 1] === "|") {
      cell += "|";
      i += 1;
    } else if (line[i] === "|") {
      cells.push(cell.trim());
      cell = "";
    } else {
      cell += line[i];
    }
  }
  cells.push(cell.trim());
  if (cells.length > 1 && cells[0] === "") cells.shift();
  if (cells.length > 1 && cells[cells.length - 1] === "") cells.pop();
  return cells;
}

/**
 * The alignments in a line such as `| :-- | --: |`; null for other lines.
 * @param {string} line
 * @returns {Alignment[] | null}
 */
export function alignmentsOf(line) {
  if (!/^[ \t|:-]*$/.test(line) || !line.includes("|")) return null;
  const cells = cellsOf(line);
  if (!cells.every((cell) => /^:?-+:?$/.test(cell))) return null;
  return cells.map((cell) => {
    const isLeft = cell.startsWith(":");
    if (cell.endsWith(":")) return isLeft ? "center" : "right";
    return isLeft ? "left" : null;
  });
}
