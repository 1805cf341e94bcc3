// Loads an adapter and unloads it again: npm ci && npm run build, then
// node examples/manage-adapters.mjs NAME PATH "your question"    (PATH: inside the server's --adapter-dir)

import process from "node:process";
import { StellarByte, StellarByteError } from "@stellarbyte/client";

const [name, path, question] = process.argv.slice(2);
const client = new StellarByte({ adminApiKey: process.env.STELLARBYTE_ADMIN_API_KEY });

try {
  const tokenized = await client.tokenize({ messages: [{ role: "user", content: question }] });
  console.log(`question: ${tokenized.count} of at most ${tokenized.max_model_len} tokens`);
  const loaded = await client.adapters.load(name, path);
  console.log(`loaded ${name}: rank ${loaded.rank}, ${loaded.matched.length} modules, ${loaded.bytes} bytes`);
  for (const { id, state, tier, requests, tokens } of await client.adapters.list()) {
    console.log(`${id}: ${state}, ${tier}, ${requests} requests, ${tokens} tokens`);
  }
  console.log(`unloaded ${name}: ${(await client.adapters.unload(name)).freed_bytes} bytes freed`);
} catch (error) {
  if (!(error instanceof StellarByteError)) throw error;
  console.error(`error: ${error.message}`);
  process.exitCode = 1;
}
