// Trees of markdown.js and HTML of markdown-it in one form, so that both can be compared.

import markdownIt from "markdown-it";

/** The other renderer, told to do what ours does: raw HTML is text, links go to the web or to mail only. */
export function oracle() {
  const renderer = markdownIt({ html: false });
  renderer.validateLink = (/** @type {string} */ address) => /^(https?:\/\/|mailto:)/i.test(address);
  return renderer;
}

const VOID = new Set(["br", "hr"]);

function escape(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");
}

/** Both ways to write an address that browsers take for the same. */
function hrefOf(address) {
  return escape(decodeURI(encodeURI(decodeURI(address.replace(/%(?![0-9a-f]{2})/gi, "%25")))));
}

function htmlOf(node) {
  if (typeof node === "string") return escape(node);
  const inner = node.children.map(htmlOf).join("");
  const { class: name, start, href } = node.attributes;
  if (node.tag === "figure") {
    const [caption, pre] = node.children;
    const language = caption.children[0].children[0];
    return `<pre><code${language ? ` class="language-${escape(language)}"` : ""}>${htmlOf(pre.children[0].children[0])}</code></pre>`;
  }
  if (name === "table") return inner;
  if (node.tag === "a") return `<a href="${hrefOf(href)}">${inner}</a>`;
  if (VOID.has(node.tag)) return `<${node.tag}>`;
  return `<${node.tag}${name ? ` ${name}` : ""}${start === undefined ? "" : ` start="${start}"`}>${inner}</${node.tag}>`;
}

export function normalTree(nodes) {
  return withoutGaps(nodes.map(htmlOf).join(""));
}

export function normalHtml(html) {
  return withoutGaps(
    html
      .replace(/(<a [^>]*>)<img src="[^"]*" alt="([^"]*)">(<\/a>)/g, "$1$2$3") // a picture in a link is its text
      .replace(/<img src="([^"]*)" alt="([^"]*)"(?: title="[^"]*")?>/g, '<a href="$1">$2</a>')
      .replace(/ title="[^"]*"/g, "")
      .replace(/ style="text-align:(left|center|right)"/g, " $1")
      .replace(/<s>(.*?)<\/s>/gs, "<del>$1</del>")
      .replace(/<a href="([^"]*)">/g, (_, address) => `<a href="${hrefOf(address.replaceAll("&amp;", "&"))}">`),
  );
}

/** White space between blocks says nothing; in code it does. */
function withoutGaps(html) {
  return html
    .split(/(<pre>.*?<\/pre>)/s)
    .map((part) =>
      part.startsWith("<pre>")
        ? part
        : part
            .replace(/\s*(<\/?(?:p|ul|ol|li|blockquote|h\d|hr|table|thead|tbody|tr|th|td)\b[^>]*>)\s*/g, "$1")
            .replace(/(<br>)\s*/g, "$1"),
    )
    .join("")
    .trim();
}
