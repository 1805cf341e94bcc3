"""`python -m tests.support.servers.reasoning_server FLAGS`: the server before `reasoning_engine`, and its model."""

import json
import sys
from pathlib import Path

from stellarbyte_server.__main__ import main

# Like Qwen 3's: it shows earlier reasoning, and a switch and an effort change the start of the answer.
CHAT_TEMPLATE = (
    "{% if reasoning_effort is defined %}effort={{ reasoning_effort }};{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% elif opens is defined and opens %}<think>\n{% endif %}{% endif %}"
)


def make_model_folder(folder: Path) -> Path:
    from tests.support.engines.reasoning_engine import reasoning_tokenizer  # the engine's side

    folder.mkdir(parents=True, exist_ok=True)
    reasoning_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    sys.exit(main(engine_module="tests.support.engines.reasoning_engine"))
