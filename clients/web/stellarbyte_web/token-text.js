// What each token of an answer shows: a character whose bytes lie in several tokens is shown by the last of them.

/** @import { TokenLogprob } from "../types.js" */

const PART = "·"; // a token that ends within a character

/**
 * A function that is given the tokens of one answer in their order.
 * @returns {(token: TokenLogprob) => string}
 */
export function tokenTexts() {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return (token) => {
    if (token.bytes === null) return token.token;
    return decoder.decode(new Uint8Array(token.bytes), { stream: true }) || (token.bytes.length > 0 ? PART : "");
  };
}
