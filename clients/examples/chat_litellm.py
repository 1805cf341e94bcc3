"""Streams one answer with litellm: python clients/examples/chat_litellm.py "your question"."""

import os
import sys

import httpx

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else importing litellm fetches a price list

import litellm


def main() -> None:
    question = " ".join(sys.argv[1:]) or "What is the capital of France?"
    url = os.environ.get("STELLARBYTE_URL", "http://127.0.0.1:8000") + "/v1"
    model = httpx.get(f"{url}/models").json()["data"][0]["id"]
    stream = litellm.completion(
        model=f"openai/{model}",
        api_base=url,
        api_key="unused",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        sys.stdout.write(chunk.choices[0].delta.content or "")
        sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
