"""`python -m tests.support.servers.harmony_server FLAGS`: the server before `harmony_engine`, and its model."""

import json
import sys
from pathlib import Path

from stellarbyte_server.__main__ import main
from tests.support.tools.templates import HARMONY


def make_model_folder(folder: Path) -> Path:
    from tests.support.engines.harmony_engine import harmony_tokenizer  # the engine's side

    folder.mkdir(parents=True, exist_ok=True)
    harmony_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|return|>", "chat_template": HARMONY}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    sys.exit(main(engine_module="tests.support.engines.harmony_engine"))
