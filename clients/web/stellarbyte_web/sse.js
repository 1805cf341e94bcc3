// Parses server-sent events from a stream of bytes.

/** Takes bytes in pieces of any size; an event is complete at its blank line. */
class EventReader {
  constructor() {
    this.decoder = new TextDecoder(); // removes a byte order mark
    this.text = "";
    this.endedWithReturn = false;
    /** @type {string[]} */
    this.data = [];
  }

  /**
   * @param {Uint8Array} bytes
   * @returns {string[]} the data of newly completed events
   */
  push(bytes) {
    let text = this.decoder.decode(bytes, { stream: true });
    if (this.endedWithReturn && text.startsWith("\n")) text = text.slice(1);
    if (text !== "") this.endedWithReturn = text.endsWith("\r");
    const lines = (this.text + text).split(/\r\n|\r|\n/);
    this.text = /** @type {string} */ (lines.pop());
    return lines.flatMap((line) => this.#addLine(line));
  }

  /** @param {string} line */
  #addLine(line) {
    if (line === "") {
      const event = this.data.join("\n");
      const isEmpty = this.data.length === 0;
      this.data = [];
      return isEmpty ? [] : [event];
    }
    const [, name, value] = /** @type {RegExpExecArray} */ (/^([^:]*)(?:: ?(.*))?$/s.exec(line));
    if (name === "data") this.data.push(value ?? "");
    return []; // comments have an empty name; other fields are not used
  }
}

/**
 * The data of each event. An event without its end is dropped.
 * @param {AsyncIterable<Uint8Array>} chunks
 * @returns {AsyncGenerator<string, void, void>}
 */
export async function* readEvents(chunks) {
  const reader = new EventReader();
  for await (const bytes of chunks) yield* reader.push(bytes);
}
