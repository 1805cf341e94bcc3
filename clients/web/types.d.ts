// Types common to the pages' modules. Not served: for tsc and editors only.

import type { SAMPLING_FIELDS } from "./stellarbyte_web/sampling-fields.js";

// Markdown

export type Alignment = "left" | "center" | "right" | null;

/** A block; its kind determines which fields are used. */
export interface Block {
  kind: "document" | "quote" | "list" | "item" | "paragraph" | "heading" | "code" | "rule" | "table";
  /** The first character of its first line in the text. */
  start: number;
  firstLine: number;
  lastLine: number;
  children: Block[];
  /** Of a paragraph, a heading or code. */
  lines: string[];
  /** Of a table, the head first. */
  rows: string[][];
  alignments: Alignment[];
  /** Of a heading, 1 to 6. */
  level: number;
  /** Columns of an item's content, or before a fence. */
  indent: number;
  /** Of fenced code; "" for indented code. */
  fence: string;
  info: string;
  /** Of a list: its bullet, or the character after its numbers. */
  delimiter: string;
  number: number | null;
}

/** An element to show; its tag is one of a few. */
export interface MarkElement {
  tag: string;
  attributes: Record<string, string>;
  children: MarkNode[];
}

export type MarkNode = string | MarkElement;

/** A run of marks that may begin or end emphasis. */
export interface Delimiter {
  character: "*" | "_" | "~";
  /** Remaining marks, and their original number. */
  count: number;
  length: number;
  canOpen: boolean;
  canClose: boolean;
  /** Elements that end and begin here, in the order of the text. */
  closing: string[];
  opening: string[];
}

export type Piece = MarkNode | Delimiter;

// The server's API

export interface TopLogprob {
  token: string;
  logprob: number;
  bytes: number[] | null;
}

export interface TokenLogprob extends TopLogprob {
  top_logprobs: TopLogprob[];
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  prompt_tokens_details?: { cached_tokens: number };
  evicted_tokens?: number;
}

export interface ChatChunk {
  choices: {
    delta: { content?: string | null; reasoning_content?: string };
    logprobs?: { content: TokenLogprob[] | null } | null;
    finish_reason: string | null;
  }[];
  usage?: Usage | null;
}

export interface ModelCard {
  id: string;
  parent: string | null;
  max_model_len: number;
}

export interface AdapterEntry {
  id: string;
  state: "loading" | "ready" | "draining" | "failed";
  error: string | null;
  tier: "gpu" | "slot" | "cpu" | "disk";
  content_hash: string | null;
  rank: number | null;
  bytes: number;
  refcount: number;
  requests: number;
  tokens: number;
}

export interface LoadedAdapter {
  lora_name: string;
  bytes: number;
  matched: string[];
  unmatched: string[];
}

/** The sampling parameters; an empty field is absent, so that the server's default applies. */
export type Sampling = { [Name in (typeof SAMPLING_FIELDS)[number]["name"]]?: number | string | string[] };

export interface ChatBody extends Sampling {
  model: string;
  messages: { role: "system" | "user" | "assistant"; content: string }[];
  adapter_scale?: number;
  logprobs?: true;
  top_logprobs?: number;
  stream_options: { include_usage: true };
}

// Conversations

export interface Question {
  role: "user";
  content: string;
}

export interface Failure {
  /** refused: the server answered with an error; gone: no answer; broken: the answer broke off. */
  kind: "refused" | "gone" | "broken";
  /** The HTTP status; null for an error within a stream, or without an answer. */
  status: number | null;
  /** The server's message. */
  message: string;
  retryAfterS: number | null;
}

export interface Answer {
  role: "assistant";
  /** The model's reasoning before its content. */
  reasoning: string;
  content: string;
  model: string;
  scale: number | null;
  state: "streaming" | "done" | "stopped" | "failed";
  finishReason: string | null;
  failure: Failure | null;
  /** With their probabilities, if requested. */
  tokens: TokenLogprob[];
  /** By the browser's clock; `pieces` counts chunks with text. */
  timing: { sentMs: number; firstMs: number | null; lastMs: number | null; pieces: number };
  usage: Usage | null;
}

export type Message = Question | Answer;

export interface Column {
  model: string | null;
  scale: number;
  /** Alternating questions and answers. */
  messages: Message[];
}

// Sampling controls

export type SamplingField = { name: keyof Sampling } & (
  | { kind: "number" | "integer"; min: number; max: number }
  | { kind: "lines"; maxLines: number; maxCharacters: number }
  | { kind: "choice"; choices: readonly string[] }
);

export interface Problem {
  key: "notANumber" | "notAnInteger" | "notAtLeast" | "notBetween" | "tooManyLines" | "tooLong";
  values?: Record<string, string | number>;
}

// Fine-tuning

export type ExampleFormat = "jsonl" | "pairs" | "csv" | "tsv";

export interface Example {
  /** Its first line in the text, from 1. */
  line: number;
  messages: { role: string; content: string }[];
  /** As it is sent, in one line. */
  json: string;
}

export interface ExampleProblem {
  line: number;
  key:
    | "exampleNotJson"
    | "exampleNotObject"
    | "exampleNoMessages"
    | "exampleRole"
    | "exampleNoContent"
    | "exampleAnswerNotLast"
    | "exampleNoQuestion"
    | "exampleNoAnswer"
    | "exampleNotTwoColumns"
    | "exampleQuoteOpen";
}

export interface Examples {
  format: ExampleFormat;
  examples: Example[];
  problems: ExampleProblem[];
}

/** The server's check of uploaded examples. */
export interface CheckedFiles {
  examples: number;
  validation_examples: number | null;
  hyperparameters: { n_epochs: number | "auto" };
  /** Of all epochs. */
  steps: number | null;
  tokens: number | null;
  memory: number | null;
  seconds: number | null;
  problems: { param: string | null; line: number | null; message: string }[];
}

export interface CheckBody {
  training_file: string;
  validation_file?: string;
  hyperparameters?: { n_epochs: number };
}

/** Of a job, without its examples. */
export interface JobSettings {
  suffix?: string;
  publish?: PublishBody;
  evaluate?: ["exact_match"];
}

export interface JobBody extends CheckBody, JobSettings {
  model: string;
}

/** A figure of the validation file: with the new adapter, without it, and with the version that was live before. */
export interface Compared {
  valid: number | null;
  base_valid: number | null;
  previous_valid: number | null;
}

export interface TuningJob {
  id: string;
  status: "validating_files" | "queued" | "running" | "paused" | "succeeded" | "failed" | "cancelled";
  model: string;
  user_provided_suffix: string | null;
  fine_tuned_model: string | null;
  created_at: number;
  finished_at: number | null;
  estimated_finish: number | null;
  error: { code: string; message: string; param: string | null } | null;
  training_file: string;
  validation_file: string | null;
  result_files: string[];
  losses: Compared & { train: number | null };
  /** Shares; null: not asked for. */
  exact_match: Compared | null;
  /** `version`: once it is live. */
  publish: { name: string; share: number | null; version: number | null; error: string | null } | null;
}

export interface JobEvent {
  id: string;
  created_at: number;
  level: "info" | "warn" | "error";
  message: string;
  data: { step: number; total_steps: number; train_loss?: number; valid_loss?: number } | null;
}

export interface PublishBody {
  name: string;
  share?: number;
}

export interface AdapterVersion {
  version: number;
  content_hash: string;
  source: string;
  created_at: number;
  created_by: string | null;
  /** The fine-tuning job that trained it. */
  job: string | null;
  current: boolean;
  share: number | null;
}

export interface AdapterHistory {
  id: string;
  current: number;
  /** Oldest first. */
  data: AdapterVersion[];
}

// Status

export interface Sample {
  name: string;
  value: number;
}

export interface Point {
  timeMs: number;
  /** null: no measurement. */
  value: number | null;
}
