"""Streams one answer with langchain-openai: python clients/examples/chat_langchain.py "your question"."""

import os
import sys

import httpx
from langchain_openai import ChatOpenAI


def main() -> None:
    question = " ".join(sys.argv[1:]) or "What is the capital of France?"
    url = os.environ.get("STELLARBYTE_URL", "http://127.0.0.1:8000") + "/v1"
    model = httpx.get(f"{url}/models").json()["data"][0]["id"]
    chat = ChatOpenAI(base_url=url, api_key="unused", model=model, temperature=0)
    for chunk in chat.stream(question):
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
