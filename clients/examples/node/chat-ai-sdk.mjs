// Streams one answer with the Vercel AI SDK: npm install, then node chat-ai-sdk.mjs "your question".
// It speaks to the server only: no gateway of Vercel's, and the SDK's telemetry is off unless asked for.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { streamText } from "ai";

const url = process.env.STELLARBYTE_URL ?? "http://127.0.0.1:8000";
const prompt = process.argv.slice(2).join(" ") || "What is the capital of France?";
const model = (await (await fetch(`${url}/v1/models`)).json()).data[0].id;
const provider = createOpenAICompatible({ name: "stellarbyte", baseURL: `${url}/v1` });

const { fullStream } = streamText({ model: provider(model), prompt, temperature: 0, onError: () => {} });
for await (const part of fullStream) {
  if (part.type === "text-delta") process.stdout.write(part.text);
  if (part.type === "error") throw part.error;
}
process.stdout.write("\n");
