"""Downloads models from the Hugging Face Hub by their names, into the Hub's own cache."""

import re
from pathlib import Path

from stellarbyte.checkpoint.errors import CheckpointError, one_line

HUB_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
SMALL_FILES = (
    *("config.json", "generation_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt"),
)
WEIGHTS = ("*.safetensors", "model.safetensors.index.json")
OTHER_WEIGHTS = ("*/*.safetensors", "consolidated*.safetensors", "adapter_model.safetensors")  # of other formats
TOKEN_ADVICE = "`hf auth login` or the variable HF_TOKEN gives access"


def download(name: str, *, needs_weights: bool = True) -> Path:
    """The folder of a model, by a name that matches HUB_NAME; downloads only missing files.

    Cache, token and address are huggingface_hub's (HF_HOME, HF_TOKEN, HF_ENDPOINT); without a connection, the cache is
    used.

    Raises:
        CheckpointError: the model or revision does not exist, may not be read, or cannot be downloaded.
    """
    # Slow to import, and few starts need it.
    from huggingface_hub import constants, errors, snapshot_download

    match = HUB_NAME.fullmatch(name)
    assert match is not None
    repository, revision = match["repository"], match["revision"]
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[*SMALL_FILES, *(WEIGHTS if needs_weights else ())],
            ignore_patterns=list(OTHER_WEIGHTS),
        )
    except errors.GatedRepoError as error:
        address = f"{constants.ENDPOINT}/{repository}"
        raise CheckpointError(f"{repository} is gated: accept its terms at {address}, then {TOKEN_ADVICE}.") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is no path {name}, and {constants.ENDPOINT} has no model of this name or keeps it private"
            f" ({TOKEN_ADVICE})."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} has no revision {revision!r}: no such branch, tag or commit.") from error
    except errors.LocalEntryNotFoundError as error:
        why = (
            "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached or fails"
        )
        raise CheckpointError(
            f"There is no path {name}, the Hub's cache ({constants.HF_HUB_CACHE}) does not hold all of a model of this"
            f" name, and {why}."
        ) from error
    except Exception as error:  # errors of HTTP, the cache or the disk have no common base
        raise CheckpointError(f"{name} cannot be downloaded: {one_line(error)}.") from error
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(
            f"{repository} has no config.json, so it is no model in Hugging Face's format; of a repository of GGUF"
            " files, download one and give its path."
        )
    return Path(folder)
