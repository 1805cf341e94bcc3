#!/usr/bin/env bash
# Streams one answer with curl, event by event: clients/examples/chat.sh "your question"
set -euo pipefail
url="${STELLARBYTE_URL:-http://127.0.0.1:8000}"
question="${*:-What is the capital of France?}"
model="$(curl -fsS "$url/v1/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')"
body="$(python3 -c 'import json, sys; print(json.dumps({"model": sys.argv[1], "stream": True, "temperature": 0,
    "messages": [{"role": "user", "content": sys.argv[2]}]}))' "$model" "$question")"
curl -fsS -N "$url/v1/chat/completions" -H 'Content-Type: application/json' -d "$body"
