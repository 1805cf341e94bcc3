// Client of a StellarByte server's API beyond OpenAI's, for TypeScript and JavaScript.

export type * from "./answers.js";
export { type Adapters, StellarByte, type WatchOptions } from "./client.js";
export type { StellarByteOptions } from "./connection.js";
export { ConnectionFailed, type ErrorDetail, ServerError, StellarByteError, UnexpectedAnswer } from "./errors.js";
