// Detects silence: a hanging server sends nothing at all.

export const SILENCE_S = 10; // an idle server begins an answer sooner

export class SilenceWatch {
  /** @param {(seconds: number) => void} told is called every SILENCE_S seconds until data arrives */
  constructor(told) {
    this.told = told;
    /** @type {ReturnType<typeof setInterval> | undefined} */
    this.timer = undefined;
    this.heard();
  }

  heard() {
    this.end();
    let seconds = 0;
    this.timer = setInterval(() => {
      seconds += SILENCE_S;
      this.told(seconds);
    }, SILENCE_S * 1000);
  }

  end() {
    clearInterval(this.timer);
  }
}
