// What a StellarByte server offers beyond OpenAI's API, for TypeScript and JavaScript. Knows the server by HTTP only.

export type * from "./answers.js";
export { type Adapters, StellarByte, type StellarByteOptions, type WatchOptions } from "./client.js";
export { ConnectionFailed, type ErrorDetail, ServerError, StellarByteError, UnexpectedAnswer } from "./errors.js";
