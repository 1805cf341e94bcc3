"""Streams one answer with the official openai package: python clients/examples/chat.py "your question"."""

import os
import sys

from openai import OpenAI


def main() -> None:
    question = " ".join(sys.argv[1:]) or "What is the capital of France?"
    client = OpenAI(base_url=os.environ.get("STELLARBYTE_URL", "http://127.0.0.1:8000") + "/v1", api_key="unused")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, stream=True
    )
    for chunk in stream:
        sys.stdout.write(chunk.choices[0].delta.content or "")
        sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
