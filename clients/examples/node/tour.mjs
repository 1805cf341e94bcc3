// A tour of the API with the official openai package for Node: npm install, then node tour.mjs.
// Prints a line for each step; ends with an error at the first answer that is not as it should be.

import assert from "node:assert/strict";
import OpenAI from "openai";

const url = process.env.STELLARBYTE_URL ?? "http://127.0.0.1:8000";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused" });
const question = "What is the capital of France?";
const messages = [{ role: "user", content: question }];

const model = (await client.models.list()).data[0].id;
console.log(`models: ${model}`);

const completion = await client.completions.create({
  model, prompt: "The capital of France is", temperature: 0, max_tokens: 3,
});
assert.ok(completion.choices[0].text.length > 0);
console.log(`completion: ${completion.choices[0].text.trim()}`);

let said = "";
let usage;
const chunks = await client.chat.completions.create({
  model, messages, temperature: 0, max_tokens: 24, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of chunks) {
  said += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
const whole = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 24 });
assert.equal(said, whole.choices[0].message.content);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
console.log(`streamed chat: ${said}`);

const schema = {
  type: "object",
  properties: { city: { enum: ["Paris", "London"] }, population: { type: "integer", minimum: 1, maximum: 99999999 } },
  required: ["city", "population"],
  additionalProperties: false,
};
const structured = await client.chat.completions.create({
  model, messages, temperature: 0, max_tokens: 40,
  response_format: { type: "json_schema", json_schema: { name: "capital", schema, strict: true } },
});
const capital = JSON.parse(structured.choices[0].message.content);
assert.deepEqual(Object.keys(capital), ["city", "population"]);
assert.ok(schema.properties.city.enum.includes(capital.city) && Number.isInteger(capital.population));
console.log(`json_schema: ${JSON.stringify(capital)}`);

const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather in a city.",
    parameters: {
      type: "object",
      properties: { city: { enum: ["Paris", "London"] } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};
const asked = [{ role: "user", content: "What is the weather in Paris?" }];
const called = await client.chat.completions.create({
  model, messages: asked, temperature: 0, max_tokens: 60,
  tools: [weather], tool_choice: "required", parallel_tool_calls: false,
});
assert.equal(called.choices[0].finish_reason, "tool_calls");
const [call] = called.choices[0].message.tool_calls;
assert.equal(call.function.name, "get_weather");
assert.ok(["Paris", "London"].includes(JSON.parse(call.function.arguments).city));
const told = await client.chat.completions.create({
  model, temperature: 0, max_tokens: 24, tools: [weather], tool_choice: "none",
  messages: [...asked, called.choices[0].message, { role: "tool", tool_call_id: call.id, content: "18 °C and sunny" }],
});
assert.ok(told.choices[0].message.content.length > 0);
console.log(`tool call: ${call.function.name}(${call.function.arguments}), then: ${told.choices[0].message.content}`);

const embedded = await client.embeddings.create({ model, input: ["a cat", "a dog"] });
const length = Math.hypot(...embedded.data[1].embedding);
assert.equal(embedded.data.length, 2);
assert.ok(Math.abs(length - 1) < 1e-3);
console.log(`embeddings: ${embedded.data.length} of ${embedded.data[1].embedding.length} numbers`);

let written = "";
let response;
const events = await client.responses.create({
  model, input: question, temperature: 0, max_output_tokens: 24, stream: true,
});
for await (const event of events) {
  if (event.type === "response.output_text.delta") written += event.delta;
  if (event.type === "response.completed" || event.type === "response.incomplete") response = event.response;
}
assert.equal(written, response.output[0].content[0].text);
assert.equal(written, said);
console.log(`streamed response: ${written}`);

await assert.rejects(client.chat.completions.create({ model, messages, no_such_field: 1 }), (error) => {
  return error instanceof OpenAI.BadRequestError && error.param === "no_such_field";
});
console.log("error: names the wrong field");
