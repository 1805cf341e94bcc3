// What a StellarByte server offers beyond OpenAI's API, for TypeScript and JavaScript. Knows the server by HTTP only.

export type * from "./answers.js";
export { type Adapters, StellarByte, type WatchOptions } from "./client.js";
export type { StellarByteOptions } from "./connection.js";
export { ConnectionFailed, type ErrorDetail, ServerError, StellarByteError, UnexpectedAnswer } from "./errors.js";
