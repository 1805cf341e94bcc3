"""Loads an adapter, asks it, and unloads it again, with stellarbyte_client: pip install './clients/python[openai]'.

python clients/examples/manage_adapters.py NAME PATH "your question"    (PATH: inside the server's --adapter-dir)
"""

import os
import sys

from stellarbyte_client import StellarByte, StellarByteError


def main(name: str, path: str, question: str) -> None:
    messages = [{"role": "user", "content": question}]
    with StellarByte(admin_api_key=os.environ.get("STELLARBYTE_ADMIN_API_KEY")) as client:
        tokenized = client.tokenize(messages=messages)
        print(f"question: {tokenized.count} of at most {tokenized.max_model_len} tokens")
        loaded = client.adapters.load(name, path)
        print(f"loaded {name}: rank {loaded.rank}, {len(loaded.matched)} modules, {loaded.bytes} bytes")
        answer = client.openai().chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=60)
        print(f"{name}: {answer.choices[0].message.content}")
        for adapter in client.adapters.list():
            print(
                f"{adapter.id}: {adapter.state}, {adapter.tier}, {adapter.requests} requests, {adapter.tokens} tokens"
            )
        print(f"unloaded {name}: {client.adapters.unload(name).freed_bytes} bytes freed")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except StellarByteError as error:
        sys.exit(f"error: {error}")
