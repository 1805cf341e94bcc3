// A server's address and keys, and HTTP requests to it. Needs fetch, so runs in browsers and in Node.

import { ConnectionFailed } from "./errors.js";

const DEFAULT_URL = "http://127.0.0.1:8000";
const DEFAULT_TIMEOUT_MS = 60_000;
const MAX_TIMEOUT_MS = 2 ** 31 - 1; // longer timers fire at once

export interface StellarByteOptions {
  /** The server's address without /v1; default: STELLARBYTE_URL, or http://127.0.0.1:8000. */
  readonly baseUrl?: string;
  /** Sent with all calls but the operator's. An empty key means none. */
  readonly apiKey?: string;
  /** Sent with the operator's calls (`adapters.load` and `unload`), and with all without `apiKey`. */
  readonly adminApiKey?: string;
  /** Limit of each call, to the last byte of its answer; default: 60 seconds. */
  readonly timeoutMs?: number;
}

/** An answer of any status, with its text. */
export interface Answer {
  readonly response: Response;
  readonly text: string;
}

/** Checked options of the connection to a server. */
export interface Connection {
  readonly baseUrl: string;
  readonly apiKey: string | undefined;
  readonly adminApiKey: string | undefined;
  readonly timeoutMs: number;
}

interface AskOptions {
  readonly body?: object;
  readonly isAdmin?: boolean;
  /** Aborts the request, which then rejects. */
  readonly signal?: AbortSignal | undefined;
}

type Method = "GET" | "POST";
export type Ask = (method: Method, path: string, options?: AskOptions) => Promise<Answer>;

/** Checks options; TypeError, without keys in it, if one is invalid. */
export function connectionOf(options: StellarByteOptions): Connection {
  return {
    baseUrl: httpAddress(options.baseUrl ?? environment("STELLARBYTE_URL") ?? DEFAULT_URL),
    apiKey: usableKey("apiKey", options.apiKey),
    adminApiKey: usableKey("adminApiKey", options.adminApiKey),
    timeoutMs: usableTimeout(options.timeoutMs ?? DEFAULT_TIMEOUT_MS),
  };
}

/** Sends a request; rejects with ConnectionFailed without an answer. */
export async function ask(
  { baseUrl, apiKey, adminApiKey, timeoutMs }: Connection,
  method: Method,
  path: string,
  { body, isAdmin = false, signal }: AskOptions = {},
): Promise<Answer> {
  const timeout = AbortSignal.timeout(timeoutMs);
  const key = isAdmin ? (adminApiKey ?? apiKey) : (apiKey ?? adminApiKey); // the admin key permits all routes
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
      : `cannot be reached: ${(cause instanceof Error && cause.message) || message}`; // the cause is from Node
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
  return Math.ceil(timeoutMs); // timers take whole milliseconds only
}

function environment(name: string): string | undefined {
  const { process } = globalThis as { process?: { env?: Record<string, string | undefined> } }; // browsers have none
  return process?.env?.[name] || undefined;
}
