// Matches runs of *, _ and ~~, and builds the tree of a line of pieces, by CommonMark's algorithm.

/** @import { Delimiter, MarkElement, MarkNode, Piece } from "../types.js" */

const MAX_DEPTH = 32; // of nested elements; deeper ones keep their marks as text

/**
 * Record at each run which elements end and begin there.
 * @param {Piece[]} pieces
 */
export function resolveEmphasis(pieces) {
  /** @type {Delimiter[]} */
  const openers = [];
  /** @type {Map<string, number>} By kind of closing run: the number of openers, from the bottom, that cannot match. */
  const bottoms = new Map();
  for (const closer of pieces.filter(isDelimiter)) {
    while (closer.canClose && closer.count > 0) {
      const kind = `${closer.character}${closer.canOpen}${closer.length % 3}`;
      const bottom = bottoms.get(kind) ?? 0;
      let at = openers.length - 1;
      while (at >= bottom && !matches(/** @type {Delimiter} */ (openers[at]), closer)) at -= 1;
      if (at < bottom) {
        bottoms.set(kind, openers.length);
        break;
      }
      const opener = /** @type {Delimiter} */ (openers[at]);
      join(opener, closer);
      openers.length = opener.count === 0 ? at : at + 1;
      for (const [key, value] of bottoms) bottoms.set(key, Math.min(value, openers.length));
    }
    if (closer.canOpen && closer.count > 0) openers.push(closer);
  }
  return pieces;
}

/**
 * @param {Delimiter} opener
 * @param {Delimiter} closer
 */
function join(opener, closer) {
  const width = opener.count >= 2 && closer.count >= 2 ? 2 : 1;
  const tag = opener.character === "~" ? "del" : width === 2 ? "strong" : "em";
  opener.count -= width;
  closer.count -= width;
  opener.opening.unshift(tag);
  closer.closing.push(tag);
}

/**
 * @param {Delimiter} opener
 * @param {Delimiter} closer
 */
function matches(opener, closer) {
  if (opener.character !== closer.character) return false;
  const isOdd = (opener.canClose || closer.canOpen) && (opener.length + closer.length) % 3 === 0;
  return !isOdd || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

/**
 * The tree of pieces with resolved emphasis.
 * @param {Piece[]} pieces
 * @returns {MarkNode[]}
 */
export function treeOf(pieces) {
  /** @type {{ tag: string, children: MarkNode[] }[]} */
  const stack = [{ tag: "", children: [] }];
  const top = () => /** @type {(typeof stack)[number]} */ (stack[stack.length - 1]);
  let tooDeep = 0;
  for (const piece of pieces) {
    if (!isDelimiter(piece)) {
      addTo(top().children, piece);
      continue;
    }
    const mark = (/** @type {string} */ tag) => piece.character.repeat(tag === "em" ? 1 : 2);
    for (const tag of piece.closing) {
      if (tooDeep > 0) {
        tooDeep -= 1;
        addTo(top().children, mark(tag));
      } else {
        const { tag: closed, children } = /** @type {(typeof stack)[number]} */ (stack.pop());
        addTo(top().children, { tag: closed, attributes: {}, children });
      }
    }
    addTo(top().children, piece.character.repeat(piece.count));
    for (const tag of piece.opening) {
      if (stack.length > MAX_DEPTH) {
        tooDeep += 1;
        addTo(top().children, mark(tag));
      } else {
        stack.push({ tag, children: [] });
      }
    }
  }
  return top().children;
}

/**
 * @param {MarkNode[]} nodes
 * @param {string | MarkElement} node
 */
function addTo(nodes, node) {
  const last = nodes.length - 1;
  if (node === "") return;
  if (typeof node === "string" && typeof nodes[last] === "string") nodes[last] += node;
  else nodes.push(node);
}

/**
 * @param {Piece} piece
 * @returns {piece is Delimiter}
 */
function isDelimiter(piece) {
  return typeof piece !== "string" && "character" in piece;
}
