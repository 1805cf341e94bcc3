// Polls a server that has stopped answering until it answers again.

import { ApiError } from "./api.js";

const PAUSE_MS = 1000;

/** @typedef {{ state: "up" } | { state: "gone" } | { state: "notReady", message: string } | { state: "back" }} Link */

export class Connection {
  /**
   * @param {{ ready(): Promise<void> }} server
   * @param {(link: Link) => void} changed
   */
  constructor(server, changed) {
    this.server = server;
    this.changed = changed;
    this.isWatching = false;
    this.isAway = false;
    /** @type {number | undefined} */
    this.timer = undefined;
  }

  /**
   * Poll until the server is ready. The state is then "back" if the server was away, else "up".
   * @param {boolean} isAway whether the server is known to be away; the first poll is then delayed
   */
  watch(isAway) {
    if (this.isWatching) return;
    this.isWatching = true;
    this.isAway = isAway;
    if (isAway) this.#askLater();
    else void this.#ask();
  }

  /** Poll now, not only at the next interval. */
  hurry() {
    if (!this.isWatching || this.timer === undefined) return;
    clearTimeout(this.timer);
    void this.#ask();
  }

  async #ask() {
    this.timer = undefined;
    try {
      await this.server.ready();
      this.isWatching = false;
      this.changed({ state: this.isAway ? "back" : "up" });
    } catch (error) {
      this.isAway = true;
      this.changed(error instanceof ApiError ? { state: "notReady", message: error.message } : { state: "gone" });
      this.#askLater();
    }
  }

  #askLater() {
    this.timer = setTimeout(() => void this.#ask(), PAUSE_MS);
  }
}
