// Lets the model call a tool by /v1/responses with the official openai package for Node, streamed and not:
// npm install, then node tools-responses.mjs "your question".

import assert from "node:assert/strict";
import OpenAI from "openai";

const url = process.env.STELLARBYTE_URL ?? "http://127.0.0.1:8000";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused" });
const question = process.argv.slice(2).join(" ") || "What is the weather in Paris?";
const model = (await client.models.list()).data[0].id;

const tools = [{
  type: "function",
  name: "get_weather",
  description: "The weather in a city.",
  strict: true,
  parameters: {
    type: "object",
    properties: { city: { enum: ["Paris", "London"] } },
    required: ["city"],
    additionalProperties: false,
  },
}];
const fields = { model, tools, temperature: 0, max_output_tokens: 60, parallel_tool_calls: false };

async function whole(body) {
  return await client.responses.create({ ...fields, ...body });
}

async function streamed(body) {
  const stream = client.responses.stream({ ...fields, ...body });
  const said = { message: "", function_call: "" };
  for await (const event of stream) {
    if (event.type === "response.output_text.delta") said.message += event.delta;
    if (event.type === "response.function_call_arguments.delta") said.function_call += event.delta;
  }
  const response = await stream.finalResponse();
  const [item] = response.output;
  assert.equal(said[item.type], item.type === "message" ? item.content[0].text : item.arguments);
  return response;
}

for (const ask of [whole, streamed]) {
  const input = [{ role: "user", content: question }];
  const asked = await ask({ input, tool_choice: "required" });
  const [call] = asked.output;
  assert.equal(call.type, "function_call");
  const { city } = JSON.parse(call.arguments);
  const result = { type: "function_call_output", call_id: call.call_id, output: `18 °C and sunny in ${city}` };
  const told = await ask({ input: [...input, ...asked.output, result], tool_choice: "none" });
  assert.ok(told.output_text.length > 0);
  console.log(`${ask.name}: ${call.name}(${call.arguments}), then: ${told.output_text}`);
}
