"""`stellarbyte generate`: one answer, computed here without a server."""

import argparse

from transformers import PreTrainedTokenizerFast, TextStreamer, set_seed

from stellarbyte.checkpoint.demo import resolve_model
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.native import load_model
from stellarbyte.checkpoint.progress import ProgressBar

FAILURES = (CheckpointError,)


def run(options: argparse.Namespace) -> int:
    path = resolve_model(options.model, ProgressBar("Converting the demo model"))
    model = load_model(path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    if options.raw or tokenizer.chat_template is None:
        inputs = tokenizer(options.prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": options.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    if options.seed is not None:
        set_seed(options.seed)
    sampling = {"temperature": options.temperature, "top_p": options.top_p} if options.temperature > 0 else {}
    model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=options.max_tokens,
        do_sample=options.temperature > 0,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
    return 0
