// Errors of calls.

/** The base of all errors of this package; `message` is one sentence for the user. */
export class StellarByteError extends Error {
  override name = "StellarByteError";
}

/** No answer: the server cannot be reached, or took too long. */
export class ConnectionFailed extends StellarByteError {
  override name = "ConnectionFailed";
}

/** The answer is not that of a StellarByte server of a compatible version. */
export class UnexpectedAnswer extends StellarByteError {
  override name = "UnexpectedAnswer";
}

/** The fields of the server's error object; null if an answer had none, such as a proxy's. */
export interface ErrorDetail {
  readonly type: string | null;
  readonly param: string | null;
  readonly code: string | null;
}

/** The server answered with an error. */
export class ServerError extends StellarByteError implements ErrorDetail {
  override name = "ServerError";
  readonly type: string | null;
  readonly param: string | null;
  readonly code: string | null;

  constructor(
    readonly status: number,
    message: string,
    detail: ErrorDetail,
    /** Seconds until a retry, if the server gives them. */
    readonly retryAfterSeconds: number | null,
  ) {
    super(message);
    ({ type: this.type, param: this.param, code: this.code } = detail);
  }
}

/** The error for an answer with an error status. */
export function serverError(response: Response, text: string): ServerError {
  const retryAfter = response.headers.get("Retry-After") ?? "";
  // Proxies may send a date, by a clock that may differ from this machine's.
  const retryAfterSeconds = /^\d+$/.test(retryAfter) ? Number(retryAfter) : null;
  const error = errorObject(text);
  if (error === null) {
    const message = `The answer from ${response.url} is ${response.status} ${response.statusText}`.trimEnd();
    return new ServerError(response.status, `${message}.`, { type: null, param: null, code: null }, retryAfterSeconds);
  }
  return new ServerError(response.status, error.message, error, retryAfterSeconds);
}

function errorObject(text: string): (ErrorDetail & { message: string }) | null {
  try {
    const { message, type, param, code } = JSON.parse(text).error;
    if (typeof message !== "string") return null;
    return { message, type: textOrNull(type), param: textOrNull(param), code: textOrNull(code) };
  } catch {
    return null;
  }
}

/** A string, or null for values of other types, which are not this server's. */
function textOrNull(value: unknown): string | null {
  return typeof value === "string" ? value : null;
}
