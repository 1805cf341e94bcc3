// What the server is asked and what it answers, under the API's own names. Knows no HTTP.

/** One version of an adapter as it is now. While a name is replaced, its old version drains beside the new one. */
export interface Adapter {
  /** The name that requests give as `model`. */
  readonly id: string;
  readonly state: "loading" | "ready" | "draining" | "failed";
  /** One sentence, when failed. */
  readonly error: string | null;
  /** The fastest memory it lies in; "slot" is where a CPU computes it. */
  readonly tier: "gpu" | "slot" | "cpu" | "disk";
  /** null: not read yet. */
  readonly content_hash: string | null;
  /** Where it was read from. */
  readonly root: string;
  readonly rank: number | null;
  readonly bytes: number;
  /** Requests that need this version: running and waiting. */
  readonly refcount: number;
  readonly running: number;
  readonly waiting: number;
  /** All requests there were. */
  readonly requests: number;
  /** What they generated. */
  readonly tokens: number;
}

export interface LoadedAdapter {
  readonly lora_name: string;
  readonly content_hash: string;
  readonly rank: number;
  readonly bytes: number;
  /** Modules it changes. */
  readonly matched: readonly string[];
  /** Targets its configuration names that it has no weights for. */
  readonly unmatched: readonly string[];
}

export interface UnloadedAdapter {
  readonly lora_name: string;
  readonly freed_bytes: number;
}

/** The served model, or an adapter that can be asked for. */
export interface Model {
  readonly id: string;
  /** Unix seconds. */
  readonly created: number;
  readonly owned_by: string;
  readonly root: string;
  /** The model that an adapter belongs to. */
  readonly parent: string | null;
  readonly max_model_len: number;
  /** Of the weights; null while an adapter is unread. */
  readonly content_hash: string | null;
}

interface TokenizeOptions {
  /** The served model or an adapter; all have the same tokens. */
  readonly model?: string;
  readonly add_special_tokens?: boolean;
  /** Whether to answer with the text of each token, too. */
  readonly return_token_strs?: boolean;
}

export interface TokenizePrompt extends TokenizeOptions {
  readonly prompt: string;
}

/** Messages and tools are as /v1/chat/completions takes them. */
export interface TokenizeChat extends TokenizeOptions {
  readonly messages: readonly object[];
  readonly tools?: readonly object[];
  readonly add_generation_prompt?: boolean;
  readonly continue_final_message?: boolean;
}

export interface Tokenized {
  readonly count: number;
  readonly max_model_len: number;
  readonly tokens: readonly number[];
  /** null unless asked for. */
  readonly token_strs: readonly string[] | null;
}

/** Whether the engine makes progress, and if not, why. */
export interface Health {
  readonly isHealthy: boolean;
  readonly reason: string | null;
}

/** One line of /metrics. */
export interface MetricSample {
  readonly name: string;
  readonly labels: Readonly<Record<string, string>>;
  readonly value: number;
}
