// The text of each token of an answer: a character with bytes in several tokens is shown at the last of them.

/** @import { TokenLogprob } from "../types.js" */

const PART = "·"; // a token that ends within a character

/**
 * A function that takes the tokens of one answer in order, and returns their texts.
 * @returns {(token: TokenLogprob) => string}
 */
export function tokenTexts() {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return (token) => {
    if (token.bytes === null) return token.token;
    return decoder.decode(new Uint8Array(token.bytes), { stream: true }) || (token.bytes.length > 0 ? PART : "");
  };
}
