// Fills one answer from a stream, and measures it; calls `changed` after each change.

/** @import { Answer, ChatBody, ChatChunk } from "../types.js" */
/** @import { Server } from "./api.js" */

import { failureOf } from "./api.js";

/**
 * Failures are stored in the answer; only programming errors are thrown.
 * @param {Pick<Server, "streamChat">} server
 * @param {ChatBody} body
 * @param {Answer} answer is changed until the promise resolves
 * @param {{ signal: AbortSignal, changed: () => void, now?: () => number }} options
 */
export async function fillAnswer(server, body, answer, { signal, changed, now = () => performance.now() }) {
  answer.timing.sentMs = now();
  try {
    for await (const chunk of server.streamChat(body, signal)) {
      addChunk(answer, chunk, now());
      changed();
    }
    answer.state = "done";
  } catch (error) {
    answer.state = signal.aborted ? "stopped" : "failed";
    if (!signal.aborted) answer.failure = failureOf(error);
  }
  changed();
}

/**
 * @param {Answer} answer
 * @param {ChatChunk} chunk
 * @param {number} nowMs
 */
function addChunk(answer, chunk, nowMs) {
  const choice = chunk.choices[0];
  const { timing } = answer;
  if (chunk.usage) answer.usage = chunk.usage;
  if (choice === undefined) return;
  answer.tokens.push(...(choice.logprobs?.content ?? []));
  answer.finishReason = choice.finish_reason ?? answer.finishReason;
  if (choice.finish_reason !== null) timing.lastMs = nowMs; // the last tokens may have no text
  const text = choice.delta.content ?? "";
  const reasoning = choice.delta.reasoning_content ?? "";
  if (text === "" && reasoning === "") return;
  answer.content += text;
  answer.reasoning += reasoning;
  timing.firstMs ??= nowMs;
  timing.lastMs = nowMs;
  timing.pieces += 1;
}

/**
 * The figures of an answer; null if not yet known. Without the server's count, each received piece counts as a token,
 * although it may contain several.
 * @param {Answer} answer
 */
export function measures(answer) {
  const { timing, usage } = answer;
  const { sentMs, firstMs, lastMs } = timing;
  const completion =
    usage?.completion_tokens ?? (timing.pieces > 0 ? Math.max(timing.pieces, answer.tokens.length) : null);
  const seconds = firstMs !== null && lastMs !== null ? (lastMs - firstMs) / 1000 : 0;
  return {
    firstTokenMs: firstMs === null ? null : firstMs - sentMs,
    tokensPerSecond: completion !== null && completion > 1 && seconds > 0 ? (completion - 1) / seconds : null,
    promptTokens: usage?.prompt_tokens ?? null,
    completionTokens: completion,
    isExact: usage !== null,
    cachedTokens: usage?.prompt_tokens_details?.cached_tokens ?? null,
    evictedTokens: usage === null ? null : (usage.evicted_tokens ?? 0),
  };
}
