// Reads comma- or tab-separated values, as spreadsheets write and copy them (RFC 4180).

/**
 * The records of a text; those without any text are left out. `isOpen`: the text ends within quotes.
 * @param {string} text
 * @param {"," | "\t"} separator
 * @returns {{ records: { line: number, fields: string[] }[], isOpen: boolean }} `line` is its first line, from 1
 */
export function readRecords(text, separator) {
  const reader = new RecordReader(separator);
  for (const character of text.replace(/\r\n?/g, "\n")) reader.push(character);
  return { records: reader.end(), isOpen: reader.place === "quoted" };
}

class RecordReader {
  /** @param {string} separator */
  constructor(separator) {
    this.separator = separator;
    /** @type {{ line: number, fields: string[] }[]} */
    this.records = [];
    /** @type {"start" | "plain" | "quoted" | "after quote"} Of the field. */
    this.place = "start";
    this.field = "";
    /** @type {string[]} */
    this.fields = [];
    this.line = 1;
    this.firstLine = 1;
  }

  /** @param {string} character */
  push(character) {
    if (character === "\n") this.line += 1;
    if (this.place === "quoted") {
      if (character === '"') this.place = "after quote";
      else this.field += character;
    } else if (character === this.separator) {
      this.#endField();
    } else if (character === "\n") {
      this.#endRecord();
    } else if (character === '"' && this.place === "start") {
      this.place = "quoted";
    } else if (character === '"' && this.place === "after quote") {
      this.field += character; // a doubled quote
      this.place = "quoted";
    } else {
      this.field += character;
      this.place = "plain";
    }
  }

  end() {
    this.#endRecord(this.place);
    return this.records;
  }

  #endField() {
    this.fields.push(this.field.trim());
    this.field = "";
    this.place = "start";
  }

  /** @param {"start" | "plain" | "quoted" | "after quote"} place is kept at the end of the text */
  #endRecord(place = "start") {
    this.#endField();
    this.place = place;
    if (this.fields.some((field) => field !== "")) this.records.push({ line: this.firstLine, fields: this.fields });
    this.fields = [];
    this.firstLine = this.line;
  }
}
