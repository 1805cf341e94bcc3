// The server's API for the pages: requests with the key, streams, and classes of errors.

/** @import { AdapterEntry, ChatBody, ChatChunk, Failure, LoadedAdapter, ModelCard } from "../types.js" */

import { readEvents } from "./sse.js";

const GET_LIMIT_MS = 5000; // reads are answered at once, unless the server hangs

/** The server answered with an error; the message is the server's. `status` is null for an error within a stream. */
export class ApiError extends Error {
  /**
   * @param {number | null} status
   * @param {string} message
   * @param {{ retryAfterS?: number | null }} more
   */
  constructor(status, message, { retryAfterS = null } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

/** No answer. */
export class ServerGone extends Error {
  constructor() {
    super("The server does not answer.");
    this.name = "ServerGone";
  }
}

/** An answer broke off. */
export class StreamBroken extends Error {
  constructor() {
    super("The answer was cut off.");
    this.name = "StreamBroken";
  }
}

/**
 * The error of a request as plain values; programming errors are thrown again.
 * @param {unknown} error
 * @returns {Failure}
 */
export function failureOf(error) {
  if (error instanceof ApiError) {
    return { kind: "refused", status: error.status, message: error.message, retryAfterS: error.retryAfterS };
  }
  if (!(error instanceof StreamBroken) && !(error instanceof ServerGone)) throw error;
  return { kind: error instanceof StreamBroken ? "broken" : "gone", status: null, message: "", retryAfterS: null };
}

export class Server {
  /**
   * @param {string} base the base address of routes
   * @param {() => string} key of the API; "" for none
   * @param {typeof fetch} fetcher
   */
  constructor(base, key, fetcher = (...request) => fetch(...request)) {
    this.base = base;
    this.key = key;
    this.fetcher = fetcher;
  }

  /**
   * An answer to a chat, chunk by chunk. Throws ApiError, ServerGone, StreamBroken, or the reason of `signal`.
   * @param {ChatBody} body
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<ChatChunk, void, void>}
   */
  async *streamChat(body, signal) {
    const response = await this.#request("v1/chat/completions", { body: { ...body, stream: true }, signal });
    if (response.body === null) throw new StreamBroken();
    try {
      for await (const data of readEvents(chunksOf(response.body))) {
        if (data === "[DONE]") return;
        const content = JSON.parse(data);
        if (content.error) throw new ApiError(null, content.error.message);
        yield content;
      }
    } catch (error) {
      signal.throwIfAborted();
      if (error instanceof ApiError) throw error;
      throw new StreamBroken();
    }
    throw new StreamBroken();
  }

  /** @returns {Promise<ModelCard[]>} the model first, then its adapters */
  async models() {
    return (await this.#json("v1/models")).data;
  }

  /** @returns {Promise<AdapterEntry[]>} */
  async adapters() {
    return (await this.#json("v1/adapters")).data;
  }

  /**
   * @param {string} name
   * @param {string} path
   * @param {boolean} inPlace
   * @returns {Promise<LoadedAdapter>}
   */
  loadAdapter(name, path, inPlace) {
    return this.#json("v1/load_lora_adapter", { body: { lora_name: name, lora_path: path, load_inplace: inPlace } });
  }

  /**
   * @param {string} name
   * @returns {Promise<{ lora_name: string, freed_bytes: number }>}
   */
  unloadAdapter(name) {
    return this.#json("v1/unload_lora_adapter", { body: { lora_name: name } });
  }

  /** @returns {Promise<string>} */
  async version() {
    return (await this.#json("version")).version;
  }

  /** @returns {Promise<string>} Prometheus' text format */
  async metrics() {
    const response = await this.#request("metrics");
    return response.text().catch(() => Promise.reject(new ServerGone()));
  }

  /** Resolves if the server would answer a request now; otherwise throws the reason. */
  async ready() {
    await this.#request("ready");
  }

  /**
   * @param {string} path
   * @param {{ body?: object, signal?: AbortSignal }} options
   */
  async #json(path, options = {}) {
    const response = await this.#request(path, options);
    try {
      return await response.json();
    } catch {
      throw new ServerGone(); // not an answer of this server
    }
  }

  /**
   * @param {string} path
   * @param {{ body?: object, signal?: AbortSignal }} options with a body: POST; without: GET, with a time limit
   */
  async #request(path, { body, signal = body === undefined ? AbortSignal.timeout(GET_LIMIT_MS) : undefined } = {}) {
    /** @type {Record<string, string>} */
    const headers = {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (this.key() !== "") headers["Authorization"] = `Bearer ${this.key()}`;
    /** @type {RequestInit} */
    const init = { method: body === undefined ? "GET" : "POST", headers, credentials: "omit", cache: "no-store" };
    if (body !== undefined) init.body = JSON.stringify(body);
    if (signal !== undefined) init.signal = signal;
    let response;
    try {
      response = await this.fetcher(new URL(path, this.base), init);
    } catch {
      if (signal?.reason?.name === "AbortError") throw signal.reason;
      throw new ServerGone();
    }
    if (!response.ok) throw await errorOf(response);
    return response;
  }
}

/** @param {Response} response */
async function errorOf(response) {
  const retryAfter = Number(response.headers.get("Retry-After") ?? NaN);
  const retryAfterS = Number.isFinite(retryAfter) ? retryAfter : null;
  const text = await response.text().catch(() => "");
  try {
    const { message } = JSON.parse(text).error;
    return new ApiError(response.status, String(message), { retryAfterS });
  } catch {
    return new ApiError(response.status, `HTTP ${response.status}`, { retryAfterS }); // from a proxy
  }
}

/**
 * Iterates over a stream; not every browser's streams are iterable.
 * @param {ReadableStream<Uint8Array>} stream
 * @returns {AsyncGenerator<Uint8Array, void, void>}
 */
async function* chunksOf(stream) {
  const reader = stream.getReader();
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}
