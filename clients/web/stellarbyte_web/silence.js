// Notes when nothing has come for a while, which a server that hangs never tells by itself. Knows no page, no network.

export const SILENCE_S = 10; // a server without other work begins an answer sooner

export class SilenceWatch {
  /** @param {(seconds: number) => void} told is called each SILENCE_S seconds until something is heard */
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
