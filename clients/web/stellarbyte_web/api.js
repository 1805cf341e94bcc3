// The server's API for the pages: requests with the key, streams, and classes of errors.

/** @import { AdapterEntry, AdapterHistory, ChatBody, ChatChunk, Failure, LoadedAdapter, ModelCard } from "../types.js" */
/** @import { CheckBody, CheckedFiles, JobBody, JobEvent, PublishBody, TuningJob } from "../types.js" */

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

/**
 * `body` is sent as JSON, unless it is a form. `method`: POST with a body, else GET. GET has a time limit, unless there
 * is a signal.
 * @typedef {{ body?: object, method?: "GET" | "POST" | "DELETE", signal?: AbortSignal }} RequestOptions
 */

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
  streamChat(body, signal) {
    return this.#stream("v1/chat/completions", { body: { ...body, stream: true }, signal });
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
   * @param {string} name
   * @param {string} content JSON lines
   * @returns {Promise<string>} the id of a file for fine-tuning
   */
  async uploadExamples(name, content) {
    const body = new FormData();
    body.append("purpose", "fine-tune");
    body.append("file", new Blob([content], { type: "application/jsonl" }), name);
    return (await this.#json("v1/files", { body })).id;
  }

  /** @param {string} id */
  async deleteFile(id) {
    await this.#request(`v1/files/${id}`, { method: "DELETE" });
  }

  /** @returns {Promise<string[]>} the ids of the files of fine-tuning: examples and results */
  async tuningFiles() {
    const purposes = ["fine-tune", "fine-tune-results"];
    const lists = await Promise.all(purposes.map((purpose) => this.#json(`v1/files?purpose=${purpose}`)));
    return lists.flatMap(({ data }) => data.map((/** @type {{ id: string }} */ { id }) => id));
  }

  /** @param {string} name of a fine-tuned model */
  async deleteModel(name) {
    await this.#request(`v1/models/${encodeURIComponent(name)}`, { method: "DELETE" });
  }

  /**
   * @param {CheckBody} body
   * @returns {Promise<CheckedFiles>}
   */
  checkExamples(body) {
    return this.#json("v1/fine_tuning/files/check", { body });
  }

  /**
   * @param {JobBody} body
   * @returns {Promise<TuningJob>}
   */
  createJob(body) {
    return this.#json("v1/fine_tuning/jobs", { body });
  }

  /** @returns {Promise<TuningJob[]>} the newest first */
  async jobs() {
    return (await this.#json("v1/fine_tuning/jobs?limit=50")).data;
  }

  /**
   * @param {string} id
   * @param {"cancel" | "pause" | "resume"} change
   * @returns {Promise<TuningJob>}
   */
  changeJob(id, change) {
    return this.#json(`v1/fine_tuning/jobs/${id}/${change}`, { method: "POST" });
  }

  /**
   * The events of a job as they happen, until it is over; fails as `streamChat`.
   * @param {string} id
   * @param {string | null} after the id of an event; null: from the first one
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<JobEvent, void, void>}
   */
  jobEvents(id, after, signal) {
    const since = after === null ? "" : `&after=${after}`;
    return this.#stream(`v1/fine_tuning/jobs/${id}/events?stream=true${since}`, { signal });
  }

  /**
   * Make the model of a job live under a name.
   * @param {string} id
   * @param {PublishBody} body
   */
  async publish(id, body) {
    await this.#request(`v1/fine_tuning/jobs/${id}/publish`, { body });
  }

  /**
   * @param {string} name
   * @returns {Promise<AdapterHistory>}
   */
  versions(name) {
    return this.#json(`v1/adapters/${encodeURIComponent(name)}/versions`);
  }

  /**
   * @param {string} name
   * @param {number | null} version null: the one before the current one
   * @returns {Promise<AdapterHistory>}
   */
  rollBack(name, version) {
    return this.#json(`v1/adapters/${encodeURIComponent(name)}/rollback`, {
      body: version === null ? {} : { version },
    });
  }

  /**
   * The contents of a stream's events until [DONE].
   * @param {string} path
   * @param {{ body?: object, signal: AbortSignal }} options
   * @returns {AsyncGenerator<any, void, void>}
   */
  async *#stream(path, options) {
    const { signal } = options;
    const response = await this.#request(path, options);
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

  /**
   * @param {string} path
   * @param {RequestOptions} options
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
   * @param {RequestOptions} options
   */
  async #request(path, { body, method = body === undefined ? "GET" : "POST", signal = limitOf(method) } = {}) {
    /** @type {Record<string, string>} */
    const headers = {};
    const isForm = body instanceof FormData; // the browser then writes the header
    if (body !== undefined && !isForm) headers["Content-Type"] = "application/json";
    if (this.key() !== "") headers["Authorization"] = `Bearer ${this.key()}`;
    /** @type {RequestInit} */
    const init = { method, headers, credentials: "omit", cache: "no-store" };
    if (body !== undefined) init.body = isForm ? body : JSON.stringify(body);
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

/** @param {string} method */
function limitOf(method) {
  return method === "GET" ? AbortSignal.timeout(GET_LIMIT_MS) : undefined;
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
