// Watches a server that has stopped answering until it answers again. Knows no page.

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
   * Ask until the server is ready. That it is "back" is told only if it was away; else it is "up".
   * @param {boolean} isAway whether that is known; then it is given a moment first
   */
  watch(isAway) {
    if (this.isWatching) return;
    this.isWatching = true;
    this.isAway = isAway;
    if (isAway) this.#askLater();
    else void this.#ask();
  }

  /** Ask now, not only at the next turn. */
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
