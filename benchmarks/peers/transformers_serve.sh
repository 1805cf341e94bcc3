#!/usr/bin/env bash
# transformers' own server with the demo model, in a venv of its own, until Ctrl-C:
#     benchmarks/peers/transformers_serve.sh [PORT]       (default 9100)
# Then, from another terminal:
#     python -m benchmarks.serve --chat --url transformers=http://127.0.0.1:9100 \
#         --model transformers=MODEL --lenient transformers
# with the MODEL that is printed here. The venv and the model go to PEERS_DIR (default: ~/.cache/stellarbyte-peers).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

port="${1:-9100}"
peers="${PEERS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/stellarbyte-peers}"
venv="$peers/transformers-serve"
model="$peers/SmolLM2-135M-Instruct-llama"
mkdir -p "$peers"

if [ ! -f "$venv/installed" ]; then
    .venv/bin/python -m venv "$venv"
    "$venv/bin/pip" install --disable-pip-version-check --quiet 'transformers[serving]' torch==2.13.0
    touch "$venv/installed"
fi
[ -f "$model/config.json" ] || .venv/bin/python -m benchmarks.peers.export_llama demo "$model"

echo "MODEL is $model" >&2
export HF_HUB_OFFLINE=1 HF_HOME="$peers/huggingface"
mkdir -p "$HF_HOME/hub"
exec "$venv/bin/transformers" serve "$model" --continuous-batching --device cpu --dtype float32 --port "$port"
