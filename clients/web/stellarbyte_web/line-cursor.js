// One line that is consumed from its beginning, by characters or by columns: a tab goes to the next multiple of four.

export class LineCursor {
  /** @param {string} text without its line end */
  constructor(text) {
    this.text = text;
    this.position = 0;
    this.column = 0;
  }

  /** The rest of the line. */
  get rest() {
    return this.text.slice(this.position);
  }

  get trimmed() {
    return this.rest.replace(/^[ \t]+/, "");
  }

  get isBlank() {
    return /^[ \t]*$/.test(this.rest);
  }

  /** Columns of white space ahead. */
  get indent() {
    let column = this.column;
    for (let i = this.position; ; i += 1) {
      if (this.text[i] === " ") column += 1;
      else if (this.text[i] === "\t") column += 4 - (column % 4);
      else return column - this.column;
    }
  }

  /**
   * Consume at most `count` columns of white space. A wider tab leaves spaces.
   * @param {number} count
   */
  skipColumns(count) {
    const end = this.column + count;
    while (this.column < end) {
      const character = this.text[this.position];
      if (character !== " " && character !== "\t") return;
      const width = character === " " ? 1 : 4 - (this.column % 4);
      this.position += 1;
      if (this.column + width > end) {
        this.text = " ".repeat(this.column + width - end) + this.text.slice(this.position);
        this.position = 0;
      }
      this.column = Math.min(end, this.column + width);
    }
  }

  /** @param {number} count of characters, none of them tabs */
  skipCharacters(count) {
    this.position += count;
    this.column += count;
  }
}
