// What can go wrong with a call. Knows the server's error object, and no calls.

/** The base of all errors of this package; `message` is one sentence for the user. */
export class StellarByteError extends Error {
  override name = "StellarByteError";
}

/** Nothing answered: the server cannot be reached, or took too long. */
export class ConnectionFailed extends StellarByteError {
  override name = "ConnectionFailed";
}

/** What answered is not a StellarByte server, or one of a version too far from this client's. */
export class UnexpectedAnswer extends StellarByteError {
  override name = "UnexpectedAnswer";
}

/** The fields of the server's error object; null where an answer had none, as those of a proxy. */
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
    /** After how many seconds to try again, where the server says so. */
    readonly retryAfterSeconds: number | null,
  ) {
    super(message);
    ({ type: this.type, param: this.param, code: this.code } = detail);
  }
}

/** The error that an answer with an error's status stands for. */
export function serverError(response: Response, text: string): ServerError {
  const retryAfter = response.headers.get("Retry-After") ?? "";
  // Proxies may send a date, by a clock that need not be this machine's.
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

/** What is not a text is some other server's, and means nothing here. */
function textOrNull(value: unknown): string | null {
  return typeof value === "string" ? value : null;
}
