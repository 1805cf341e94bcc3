// The sampling controls and their bounds. Written by `python -m scripts.sampling_fields` from the server's API.

export const SAMPLING_FIELDS = /** @type {const} */ ([
  { name: "temperature", kind: "number", min: 0, max: 2 },
  { name: "top_p", kind: "number", min: 0, max: 1 },
  { name: "top_k", kind: "integer", min: -1, max: 2147483647 },
  { name: "min_p", kind: "number", min: 0, max: 1 },
  { name: "max_tokens", kind: "integer", min: 1, max: 9007199254740991 },
  { name: "seed", kind: "integer", min: -9007199254740991, max: 9007199254740991 },
  { name: "repetition_penalty", kind: "number", min: 0.01, max: 100 },
  { name: "stop", kind: "lines", maxLines: 32, maxCharacters: 1000 },
  { name: "context_overflow", kind: "choice", choices: ["error", "slide"] },
]);
