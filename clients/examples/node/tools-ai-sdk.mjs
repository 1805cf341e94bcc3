// Lets the model call a tool with the Vercel AI SDK, by /v1/responses and by /v1/chat/completions, streamed and not:
// npm install, then node tools-ai-sdk.mjs "your question". The first step must call the tool, once, because small models
// rarely choose to and then rarely stop.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const url = process.env.STELLARBYTE_URL ?? "http://127.0.0.1:8000";
const prompt = process.argv.slice(2).join(" ") || "What is the weather in Paris?";
const name = (await (await fetch(`${url}/v1/models`)).json()).data[0].id;
const models = {
  "/v1/responses": createOpenAI({ baseURL: `${url}/v1`, apiKey: "unused" })(name),
  "/v1/chat/completions": createOpenAICompatible({ name: "stellarbyte", baseURL: `${url}/v1` })(name),
};

const tools = {
  get_weather: tool({
    description: "The weather in a city.",
    inputSchema: z.object({ city: z.enum(["Paris", "London"]) }),
    execute: async ({ city }) => `18 °C and sunny in ${city}`,
  }),
};

for (const [path, model] of Object.entries(models)) {
  const fields = {
    model, prompt, tools, temperature: 0, maxOutputTokens: 60, stopWhen: stepCountIs(2),
    providerOptions: { openai: { parallelToolCalls: false }, stellarbyte: { parallel_tool_calls: false } },
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
  };
  const whole = await generateText(fields);
  show(path, whole.steps, whole.text);

  const streamed = streamText({ ...fields, onError: () => {} });
  let text = "";
  for await (const part of streamed.fullStream) {
    if (part.type === "text-delta") text += part.text;
    if (part.type === "error") throw part.error;
  }
  show(`${path}, streamed`, await streamed.steps, text);
}

function show(way, steps, text) {
  const [call] = steps[0].toolCalls;
  if (steps.length !== 2 || call.toolName !== "get_weather" || text.trim() === "") throw new Error(`${way}: no answer`);
  console.log(`${way}: ${call.toolName}(${JSON.stringify(call.input)}), then: ${text.trim()}`);
}
