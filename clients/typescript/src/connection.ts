// Where a server is, which keys open it, and how it is asked. Needs fetch, so runs in browsers and in Node; knows no calls.

import { ConnectionFailed } from "./errors.js";

const DEFAULT_URL = "http://127.0.0.1:8000";
const DEFAULT_TIMEOUT_MS = 60_000;
const MAX_TIMEOUT_MS = 2 ** 31 - 1; // of timers; longer ones would end at once

export interface StellarByteOptions {
  /** The server's address, without /v1; else that in the variable STELLARBYTE_URL, else http://127.0.0.1:8000. */
  readonly baseUrl?: string;
  /** Sent with all calls but those of the operator. An empty key is none. */
  readonly apiKey?: string;
  /** Sent with those (`adapters.load` and `unload`), and with all if there is no `apiKey`. */
  readonly adminApiKey?: string;
  /** How long each call may take, to the last byte of its answer: 60 seconds unless given. */
  readonly timeoutMs?: number;
}

/** An answer with its text, whatever its status. */
export interface Answer {
  readonly response: Response;
  readonly text: string;
}

/** Where a server is and how it is asked: options that were checked. */
export interface Connection {
  readonly baseUrl: string;
  readonly apiKey: string | undefined;
  readonly adminApiKey: string | undefined;
  readonly timeoutMs: number;
}

interface AskOptions {
  readonly body?: object;
  readonly isAdmin?: boolean;
  /** Ends the asking, which then rejects. */
  readonly signal?: AbortSignal | undefined;
}

type Method = "GET" | "POST";
export type Ask = (method: Method, path: string, options?: AskOptions) => Promise<Answer>;

/** What options come to; TypeError, in which no key is shown, when one cannot be used. */
export function connectionOf(options: StellarByteOptions): Connection {
  return {
    baseUrl: httpAddress(options.baseUrl ?? environment("STELLARBYTE_URL") ?? DEFAULT_URL),
    apiKey: usableKey("apiKey", options.apiKey),
    adminApiKey: usableKey("adminApiKey", options.adminApiKey),
    timeoutMs: usableTimeout(options.timeoutMs ?? DEFAULT_TIMEOUT_MS),
  };
}

/** Rejects with ConnectionFailed where nothing answers. */
export async function ask(
  { baseUrl, apiKey, adminApiKey, timeoutMs }: Connection,
  method: Method,
  path: string,
  { body, isAdmin = false, signal }: AskOptions = {},
): Promise<Answer> {
  const timeout = AbortSignal.timeout(timeoutMs);
  const key = isAdmin ? (adminApiKey ?? apiKey) : (apiKey ?? adminApiKey); // the operator's key opens all routes
  const request: RequestInit = {
    method,
    headers: {
      ...(body === undefined ? {} : { "Content-Type": "application/json" }),
      ...(key === undefined ? {} : { Authorization: `Bearer ${key}` }),
    },
    body: body === undefined ? null : JSON.stringify(body),
    signal: signal === undefined ? timeout : AbortSignal.any([timeout, signal]),
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

function httpAddress(text: string): string {
  const protocol = URL.canParse(text) ? new URL(text).protocol : "";
  if (protocol !== "http:" && protocol !== "https:") {
    throw new TypeError(`The server's address must be a URL such as ${DEFAULT_URL}; '${text}' is not.`);
  }
  return text.replace(/\/+$/, "");
}

function usableKey(name: string, key: string | undefined): string | undefined {
  if (!key) return undefined;
  if (!/^[!-~]+$/.test(key)) {
    throw new TypeError(`${name} must consist of printable ASCII characters without spaces.`);
  }
  return key;
}

function usableTimeout(timeoutMs: number): number {
  if (!(timeoutMs > 0 && timeoutMs <= MAX_TIMEOUT_MS)) {
    const range = `a number of milliseconds above 0 and up to ${MAX_TIMEOUT_MS}`;
    throw new TypeError(`timeoutMs must be ${range}; ${timeoutMs} is not.`);
  }
  return Math.ceil(timeoutMs); // timers take whole ones only
}

function environment(name: string): string | undefined {
  const { process } = globalThis as { process?: { env?: Record<string, string | undefined> } }; // browsers have none
  return process?.env?.[name] || undefined;
}
