// The client: the request of each call, and the reader of its answer.

import type {
  Adapter,
  AdapterHistory,
  Health,
  LoadedAdapter,
  MetricSample,
  Model,
  RatingDetails,
  TokenizeChat,
  Tokenized,
  TokenizePrompt,
  UnloadedAdapter,
} from "./answers.js";
import { type Answer, type Ask, ask, connectionOf, type StellarByteOptions } from "./connection.js";
import { ConnectionFailed, serverError, UnexpectedAnswer } from "./errors.js";
import { parseMetrics } from "./metrics.js";

const NOT_READY = [502, 503, 504]; // includes the statuses of proxies without a server

export interface WatchOptions {
  /** Interval between polls of the server; default: one second. */
  readonly intervalMs?: number;
  /** Stops polling. */
  readonly signal?: AbortSignal;
}

/** A client of one server. Every call rejects with a `StellarByteError` on failure. */
export class StellarByte {
  readonly baseUrl: string;
  readonly adapters: Adapters;
  readonly #ask: Ask;

  /** TypeError, without keys in it, if an option is invalid. */
  constructor(options: StellarByteOptions = {}) {
    const connection = connectionOf(options);
    this.baseUrl = connection.baseUrl;
    this.#ask = (...call) => ask(connection, ...call);
    this.adapters = new Adapters(this.#ask);
  }

  /** The served model first, then its adapters. */
  async models(): Promise<Model[]> {
    return readList<Model>(await this.#ask("GET", "/v1/models"));
  }

  /** The tokens of a prompt, or of a chat in the model's template. */
  async tokenize(request: TokenizePrompt | TokenizeChat): Promise<Tokenized> {
    return readObject<Tokenized>(await this.#ask("POST", "/tokenize", { body: request }), "tokens");
  }

  /** The text of tokens, including special ones. */
  async detokenize(tokens: readonly number[]): Promise<string> {
    const answer = await this.#ask("POST", "/detokenize", { body: { tokens } });
    return readObject<{ prompt: string }>(answer, "prompt").prompt;
  }

  /** Rate an answer of this key by its id, on a server with --feedback. The id of the rating. */
  async rate(answerId: string, rating: "good" | "bad", more: RatingDetails = {}): Promise<string> {
    const body = { ...more, id: answerId, rating };
    return readObject<{ id: string }>(await this.#ask("POST", "/v1/feedback", { body }), "id").id;
  }

  /** All current metrics; docs/metrics.md describes them. */
  async metrics(): Promise<MetricSample[]> {
    const answer = good(await this.#ask("GET", "/metrics"));
    return parsed(answer, parseMetrics);
  }

  /** Whether the engine makes progress, or the reason why not. */
  async health(): Promise<Health> {
    return readHealth(await this.#ask("GET", "/health"));
  }

  /** Whether the server answers requests now; false also if nothing, or only a proxy, answers at the address. */
  async isReady(): Promise<boolean> {
    try {
      return readReady(await this.#ask("GET", "/ready"));
    } catch (error) {
      if (error instanceof ConnectionFailed) return false;
      throw error;
    }
  }

  async version(): Promise<string> {
    return readObject<{ version: string }>(await this.#ask("GET", "/version"), "version").version;
  }
}

/** The adapters of a server: `StellarByte.adapters`. */
export class Adapters {
  readonly #ask: Ask;

  constructor(ask: Ask) {
    this.#ask = ask;
  }

  /** All adapters by name in their current state, including unused ones in --adapter-dir. */
  async list(): Promise<Adapter[]> {
    return this.#list();
  }

  /**
   * Load the adapter at `path`, inside the server's --adapter-dir, as `name`.
   * With `replace` an existing name gets the new version; running and waiting requests keep the old one.
   * Without `probe` the server also takes an adapter that changes no logit.
   */
  async load(
    name: string,
    path: string,
    { replace = false, probe = true }: { replace?: boolean; probe?: boolean } = {},
  ): Promise<LoadedAdapter> {
    const body = { lora_name: name, lora_path: path, load_inplace: replace, ...(probe ? {} : { probe }) };
    const answer = await this.#ask("POST", "/v1/load_lora_adapter", { body, isAdmin: true });
    return readObject<LoadedAdapter>(answer, "matched");
  }

  /**
   * Unload an adapter after its running and waiting requests have ended.
   * If that takes longer than `timeoutMs`, this rejects with ConnectionFailed; the server continues to unload.
   */
  async unload(name: string): Promise<UnloadedAdapter> {
    const body = { lora_name: name };
    const answer = await this.#ask("POST", "/v1/unload_lora_adapter", { body, isAdmin: true });
    return readObject<UnloadedAdapter>(answer, "freed_bytes");
  }

  /** The versions of an adapter that the server keeps in --data-dir, oldest first. */
  async versions(name: string): Promise<AdapterHistory> {
    const path = `/v1/adapters/${encodeURIComponent(name)}/versions`;
    return readObject<AdapterHistory>(await this.#ask("GET", path, { isAdmin: true }), "shares");
  }

  /** Make an earlier version current: the one before, or one by its number or content hash. */
  async rollback(name: string, version: number | string | null = null): Promise<AdapterHistory> {
    return this.#change(name, "rollback", { version });
  }

  /**
   * Divide the callers among versions, by number or content hash; the shares add up to 1. {} ends it.
   * A caller is the request's `user`, else its key, and always gets the same version.
   */
  async split(name: string, shares: Readonly<Record<string, number>>): Promise<AdapterHistory> {
    return this.#change(name, "split", { shares });
  }

  async #change(name: string, change: "rollback" | "split", body: object): Promise<AdapterHistory> {
    const path = `/v1/adapters/${encodeURIComponent(name)}/${change}`;
    return readObject<AdapterHistory>(await this.#ask("POST", path, { body, isAdmin: true }), "shares");
  }

  /**
   * Results of `list`: the first one, then one after each change.
   * Polls the server; changes between two polls are merged.
   */
  async *watch({ intervalMs = 1000, signal }: WatchOptions = {}): AsyncGenerator<Adapter[], void, undefined> {
    let before: string | undefined;
    while (!signal?.aborted) {
      let list: Adapter[];
      try {
        list = await this.#list(signal);
      } catch (error) {
        if (signal?.aborted) return;
        throw error;
      }
      const now = JSON.stringify(list);
      if (now !== before) yield list;
      before = now;
      await pause(intervalMs, signal);
    }
  }

  async #list(signal?: AbortSignal): Promise<Adapter[]> {
    return readList<Adapter>(await this.#ask("GET", "/v1/adapters", { signal }));
  }
}

function good(answer: Answer): Answer {
  if (!answer.response.ok) throw serverError(answer.response, answer.text);
  return answer;
}

function parsed<T>(answer: Answer, parse: (text: string) => T): T {
  try {
    return parse(answer.text);
  } catch (error) {
    throw unexpected(answer, (error as Error).message, error);
  }
}

/** Reads a JSON object. Only the required field is checked. */
function readObject<T extends object>(answer: Answer, requiredField: keyof T & string): T {
  const value: unknown = parsed(good(answer), JSON.parse);
  if (typeof value !== "object" || value === null || !(requiredField in value)) {
    throw unexpected(answer, `it has no field '${requiredField}'`);
  }
  return value as T;
}

/** The entries of a list in OpenAI's form. */
function readList<T>(answer: Answer): T[] {
  const { data } = readObject<{ data: unknown }>(answer, "data");
  if (!Array.isArray(data)) throw unexpected(answer, "its field 'data' is not a list");
  return data;
}

function readHealth(answer: Answer): Health {
  if (answer.response.status === 503) {
    return { isHealthy: false, reason: serverError(answer.response, answer.text).message };
  }
  readState(answer);
  return { isHealthy: true, reason: null };
}

function readReady(answer: Answer): boolean {
  if (NOT_READY.includes(answer.response.status)) return false;
  readState(answer);
  return true;
}

/** Checks the answer of /health and /ready with status 200. */
function readState(answer: Answer): void {
  readObject<{ status: string }>(answer, "status");
}

function unexpected({ response }: Answer, why: string, cause?: unknown): UnexpectedAnswer {
  return new UnexpectedAnswer(`The answer from ${response.url} is not that of a StellarByte server: ${why}.`, {
    cause,
  });
}

/** Resolves after a time, or when the signal aborts. */
function pause(milliseconds: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve) => {
    const done = (): void => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, milliseconds);
    signal?.addEventListener("abort", done);
    if (signal?.aborted) done();
  });
}
