"""Asks the model and some adapters the same question at the same time; the server answers all of them in one batch.

python clients/examples/adapters.py "What is the capital of France?" pirate json
"""

import asyncio
import os
import sys

from openai import AsyncOpenAI

url = os.environ.get("STELLARBYTE_URL", "http://127.0.0.1:8000")
client = AsyncOpenAI(base_url=f"{url}/v1", api_key="unused")


async def ask(model: str, question: str) -> str:
    answer = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=60
    )
    return answer.choices[0].message.content or ""


async def main(question: str, adapters: list[str]) -> None:
    base = (await client.models.list()).data[0].id  # the model itself; its adapters follow
    names = [base, *adapters]
    answers = await asyncio.gather(*(ask(name, question) for name in names))
    for name, answer in zip(names, answers, strict=True):
        print(f"{name}: {answer}")


asyncio.run(main(sys.argv[1], sys.argv[2:]))
