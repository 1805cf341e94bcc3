"""`stellarbyte generate`: one answer, computed here without a server."""

import argparse
from pathlib import Path

from transformers import PreTrainedTokenizerFast, TextStreamer, set_seed

from stellarbyte.checkpoint.errors import CheckpointError, one_line
from stellarbyte.checkpoint.native import load_model
from stellarbyte.checkpoint.progress import ProgressBar
from stellarbyte.checkpoint.source import resolve_model

LEAST_TEMPERATURE = 1e-6  # smaller ones would overflow the logits; the likeliest token is certain far above


class PromptError(ValueError):
    """The prompt cannot be answered; str() is one sentence for the user."""


FAILURES = (CheckpointError, PromptError)


def run(options: argparse.Namespace) -> int:
    path = resolve_model(options.model, ProgressBar("Converting"))
    model = load_model(path)
    tokenizer = _tokenizer(path)
    if options.raw or tokenizer.chat_template is None:
        inputs = tokenizer(options.prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": options.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    if inputs["input_ids"].numel() == 0:
        raise PromptError("The prompt is empty; give at least one token.")
    last = int(inputs["input_ids"].max())
    if last >= model.config.vocab_size:
        token = tokenizer.convert_ids_to_tokens(last)
        raise PromptError(
            f"The prompt contains the token {token!r} (id {last}), but the model has embeddings for only"
            f" {model.config.vocab_size} tokens."
        )
    if options.seed is not None:
        set_seed(options.seed)
    is_greedy = options.temperature < LEAST_TEMPERATURE
    sampling = {} if is_greedy else {"temperature": options.temperature, "top_p": options.top_p}
    model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=options.max_tokens,
        do_sample=not is_greedy,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
    return 0


def _tokenizer(path: Path) -> PreTrainedTokenizerFast:
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"{path / 'tokenizer.json'} is missing; text prompts need a tokenizer.")
    try:
        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"The tokenizer of {path} cannot be read: {one_line(error)}.") from error
