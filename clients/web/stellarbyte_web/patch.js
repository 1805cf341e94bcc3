// Updates an element's children to a tree with few changes: unchanged elements keep focus and selection.

/** @import { MarkElement, MarkNode } from "../types.js" */

const TAGS = new Set([
  ..."a blockquote br button code del div em figcaption figure h1 h2 h3 h4 h5 h6 hr li ol p pre span".split(" "),
  ..."strong table tbody td th thead tr ul".split(" "),
]);

/**
 * @param {Element} parent
 * @param {readonly MarkNode[]} nodes
 * @param {number} first children before it stay unchanged
 */
export function patch(parent, nodes, first = 0) {
  nodes.forEach((node, i) => {
    const child = parent.childNodes[first + i];
    if (child === undefined) parent.append(create(node));
    else if (typeof node === "string") patchText(child, node);
    else if (child instanceof Element && isSame(child, node)) patch(child, node.children);
    else child.replaceWith(create(node));
  });
  while (parent.childNodes.length > first + nodes.length) parent.lastChild?.remove();
}

/**
 * @param {ChildNode} child
 * @param {string} text
 */
function patchText(child, text) {
  if (!(child instanceof Text)) child.replaceWith(text);
  else if (child.data !== text) child.data = text;
}

/**
 * @param {Element} element
 * @param {MarkElement} node
 */
function isSame(element, node) {
  const names = Object.keys(node.attributes);
  return (
    element.localName === node.tag &&
    element.attributes.length === names.length &&
    names.every((name) => element.getAttribute(name) === node.attributes[name])
  );
}

/**
 * @param {MarkNode} node
 * @returns {Node}
 */
function create(node) {
  if (typeof node === "string") return document.createTextNode(node);
  if (!TAGS.has(node.tag)) throw new Error(`an answer has no elements ${node.tag}`);
  const element = document.createElement(node.tag);
  for (const [name, value] of Object.entries(node.attributes)) element.setAttribute(name, value);
  element.append(...node.children.map(create));
  return element;
}
