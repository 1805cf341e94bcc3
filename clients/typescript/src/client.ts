// The client: what each call sends, and how its answer is read. Needs fetch, so runs in browsers and in Node.

import type {
  Adapter,
  Health,
  LoadedAdapter,
  MetricSample,
  Model,
  TokenizeChat,
  Tokenized,
  TokenizePrompt,
  UnloadedAdapter,
} from "./answers.js";
import { ConnectionFailed, serverError, UnexpectedAnswer } from "./errors.js";
import { parseMetrics } from "./metrics.js";

const DEFAULT_URL = "http://127.0.0.1:8000";

export interface StellarByteOptions {
  /** The server's address, without /v1; else that in the variable STELLARBYTE_URL, else http://127.0.0.1:8000. */
  readonly baseUrl?: string;
  /** Sent with all calls but those of the operator. */
  readonly apiKey?: string;
  /** Sent with those (`adapters.load` and `unload`), and with all if there is no `apiKey`. */
  readonly adminApiKey?: string;
  /** How long to wait for each answer: 60 seconds unless given. */
  readonly timeoutMs?: number;
}

export interface WatchOptions {
  /** How often the server is asked: every second unless given. */
  readonly intervalMs?: number;
  /** Ends the watching. */
  readonly signal?: AbortSignal;
}

/** An answer with its text, whatever its status. */
interface Answer {
  readonly response: Response;
  readonly text: string;
}

type Method = "GET" | "POST";
type Ask = (method: Method, path: string, body?: object, isAdmin?: boolean) => Promise<Answer>;

/** A client of one server. Every call rejects with a `StellarByteError` where it fails. */
export class StellarByte {
  readonly baseUrl: string;
  readonly adapters: Adapters;
  readonly #ask: Ask;

  /** TypeError when `baseUrl` is no HTTP address. */
  constructor(options: StellarByteOptions = {}) {
    this.baseUrl = httpAddress(options.baseUrl ?? environment("STELLARBYTE_URL") ?? DEFAULT_URL);
    this.#ask = (...call) => ask(this.baseUrl, options, ...call);
    this.adapters = new Adapters(this.#ask);
  }

  /** The served model first, then its adapters. */
  async models(): Promise<Model[]> {
    return readList<Model>(await this.#ask("GET", "/v1/models"));
  }

  /** The tokens of a prompt, or of a chat as the model's template writes it. */
  async tokenize(request: TokenizePrompt | TokenizeChat): Promise<Tokenized> {
    return readObject<Tokenized>(await this.#ask("POST", "/tokenize", request), "tokens");
  }

  /** The text of tokens, special ones included. */
  async detokenize(tokens: readonly number[]): Promise<string> {
    return readObject<{ prompt: string }>(await this.#ask("POST", "/detokenize", { tokens }), "prompt").prompt;
  }

  /** All that /metrics shows now. docs/metrics.md says what each means. */
  async metrics(): Promise<MetricSample[]> {
    const answer = good(await this.#ask("GET", "/metrics"));
    return parsed(answer, parseMetrics);
  }

  /** Whether the engine makes progress, and if not, why. */
  async health(): Promise<Health> {
    return readHealth(await this.#ask("GET", "/health"));
  }

  /** Whether requests can be answered now; false also while nothing answers at the address. */
  async isReady(): Promise<boolean> {
    try {
      return readHealth(await this.#ask("GET", "/ready")).isHealthy;
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

  /** All adapters as they are now, by name; those in --adapter-dir that nobody has asked for yet, too. */
  async list(): Promise<Adapter[]> {
    return readList<Adapter>(await this.#ask("GET", "/v1/adapters"));
  }

  /**
   * Read and check the adapter at `path`, inside the server's --adapter-dir, to be asked for as `name`.
   * With `replace` a name that exists gets the new version; requests that run or wait end on the old one.
   */
  async load(name: string, path: string, { replace = false }: { replace?: boolean } = {}): Promise<LoadedAdapter> {
    const body = { lora_name: name, lora_path: path, load_inplace: replace };
    return readObject<LoadedAdapter>(await this.#ask("POST", "/v1/load_lora_adapter", body, true), "matched");
  }

  /**
   * Take an adapter out of the server's memory once the requests that run or wait for it have ended.
   * Where that takes longer than `timeoutMs`, this rejects with ConnectionFailed, and the server goes on unloading.
   */
  async unload(name: string): Promise<UnloadedAdapter> {
    const answer = await this.#ask("POST", "/v1/unload_lora_adapter", { lora_name: name }, true);
    return readObject<UnloadedAdapter>(answer, "freed_bytes");
  }

  /**
   * What `list` gives: once at the beginning, and again whenever anything in it has changed.
   * What was between two questions is not seen.
   */
  async *watch({ intervalMs = 1000, signal }: WatchOptions = {}): AsyncGenerator<Adapter[], void, undefined> {
    let before: string | undefined;
    while (!signal?.aborted) {
      const list = await this.list();
      const now = JSON.stringify(list);
      if (now !== before) yield list;
      before = now;
      await pause(intervalMs, signal);
    }
  }
}

async function ask(
  baseUrl: string,
  { apiKey, adminApiKey, timeoutMs = 60_000 }: StellarByteOptions,
  method: Method,
  path: string,
  body?: object,
  isAdmin = false,
): Promise<Answer> {
  const key = isAdmin ? (adminApiKey ?? apiKey) : (apiKey ?? adminApiKey); // the operator's key opens all routes
  const request: RequestInit = {
    method,
    headers: {
      ...(body === undefined ? {} : { "Content-Type": "application/json" }),
      ...(key === undefined ? {} : { Authorization: `Bearer ${key}` }),
    },
    body: body === undefined ? null : JSON.stringify(body),
    signal: AbortSignal.timeout(timeoutMs),
  };
  try {
    const response = await fetch(baseUrl + path, request);
    return { response, text: await response.text() };
  } catch (error) {
    throw connectionFailed(baseUrl, error);
  }
}

function connectionFailed(baseUrl: string, error: unknown): ConnectionFailed {
  const { name, message, cause } = error as Error;
  const what =
    name === "TimeoutError"
      ? "did not answer in time"
      : `cannot be reached: ${(cause instanceof Error && cause.message) || message}`; // the cause is Node's
  return new ConnectionFailed(`The server at ${baseUrl} ${what}.`, { cause: error });
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

/** The object that was answered. Its other fields are taken to be as the server describes them. */
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
  if (!Array.isArray(data)) throw unexpected(answer, "its field 'data' is no list");
  return data;
}

function readHealth(answer: Answer): Health {
  if (answer.response.status === 503) {
    return { isHealthy: false, reason: serverError(answer.response, answer.text).message };
  }
  good(answer);
  return { isHealthy: true, reason: null };
}

function unexpected({ response }: Answer, why: string, cause?: unknown): UnexpectedAnswer {
  return new UnexpectedAnswer(`The answer from ${response.url} is not one of a StellarByte server: ${why}.`, { cause });
}

function httpAddress(text: string): string {
  const protocol = URL.canParse(text) ? new URL(text).protocol : "";
  if (protocol !== "http:" && protocol !== "https:") {
    throw new TypeError(`The server's address must look like ${DEFAULT_URL}; '${text}' does not.`);
  }
  return text.replace(/\/+$/, "");
}

function environment(name: string): string | undefined {
  const { process } = globalThis as { process?: { env?: Record<string, string | undefined> } }; // browsers have none
  return process?.env?.[name] || undefined;
}

/** Resolves after a time, or when the signal says to stop. */
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
