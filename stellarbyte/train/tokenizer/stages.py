"""Trains a tokenizer in stages: tokenizers' BpeTrainer for the first, continued merges for the others."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stellarbyte.checkpoint.staging import refuse_existing, staged_folder
from stellarbyte.train.config.tokenizer import SpecialTokens, Splits, Stage, TrainTokenizer
from stellarbyte.train.data.files import files_of
from stellarbyte.train.data.shards import write_json
from stellarbyte.train.errors import TrainError
from stellarbyte.train.tokenizer import pretokens
from stellarbyte.train.tokenizer.merges import continue_merges
from stellarbyte.train.tokenizer.report import Report, report
from stellarbyte.train.tokenizer.sampler import parts, sample

# ChatML with the end token at the end of each message, so that no other token ends an answer.
CHAT_TEMPLATE = """\
{{- bos_token if bos_token else '' -}}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + eos_token -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

OnStage = Callable[[str], None]  # a sentence about what is being done


def train_tokenizer(settings: TrainTokenizer, *, on_stage: OnStage | None = None) -> Report:
    """Train, write the folder `settings.output` and report. TrainError, or CheckpointError if it cannot be written."""
    tell = on_stage or (lambda _: None)
    refuse_existing(settings.output)
    template = _chat_template(settings.special_tokens)
    files = files_of(settings.sources)
    tokenizer: Tokenizer | None = None
    for number, stage in enumerate(settings.stages, start=1):
        tell(f"Stage {number}: reading a sample of texts")
        chosen = [file for file in files if stage.kinds is None or file.source.kind in stage.kinds]
        texts = sample((text for _, text in parts(chosen, of_report=False)), settings.sample_bytes)
        if not texts:
            raise TrainError(f"Stage {number} has no text to learn from.")
        tell(f"Stage {number}: learning {stage.vocabulary:,} tokens")
        if tokenizer is None:
            tokenizer = first_stage(texts, stage, settings.splits, settings.special_tokens)
        else:
            tokenizer = next_stage(tokenizer, texts, stage)
        if tokenizer.get_vocab_size() < stage.vocabulary:
            raise TrainError(
                f"Stage {number} found {tokenizer.get_vocab_size():,} of {stage.vocabulary:,} tokens; give more text,"
                f" a smaller vocabulary, or a min_frequency below {stage.min_frequency}."
            )
    assert tokenizer is not None
    tell("Reporting")
    made = report(tokenizer, files)
    with staged_folder(settings.output) as folder:
        save(tokenizer, settings.special_tokens, template, folder)
        write_json(folder / "report.json", made.model_dump(mode="json"))
    return made


def first_stage(texts: Iterable[str], stage: Stage, splits: Splits, special_tokens: SpecialTokens) -> Tokenizer:
    """What BpeTrainer learns from texts that are cut by `splits`. The special tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE())
    pretokens.install(tokenizer, splits)
    special = [AddedToken(token, special=True, normalized=False) for token in special_tokens.all]
    trainer = trainers.BpeTrainer(
        vocab_size=stage.vocabulary,
        min_frequency=stage.min_frequency,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _in_a_thread(lambda: tokenizer.train_from_iterator(texts, trainer))
    if special_tokens.bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special_tokens.bos} $A",
            pair=f"{special_tokens.bos} $A {special_tokens.bos} $B",
            special_tokens=[(special_tokens.bos, tokenizer.token_to_id(special_tokens.bos))],
        )
    return tokenizer


def _in_a_thread(function: Callable[[], None]) -> None:
    """Run code that takes minutes outside Python, so that Ctrl-C and SIGTERM end the program while it runs."""
    done: Future[None] = Future()

    def work() -> None:
        try:
            function()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # the threads of an executor would be waited for at exit
    done.result()


def next_stage(tokenizer: Tokenizer, texts: Iterable[str], stage: Stage) -> Tokenizer:
    """The tokenizer with further merges. All ids keep their tokens."""
    content = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = content["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    counted = Counter(piece for text in texts for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    model = tokenizer.model
    words = (([token.id for token in model.tokenize(piece)], count) for piece, count in counted.items())
    new_tokens, merges = continue_merges(words, tokens, stage.vocabulary, stage.min_frequency)
    spelled = tokens + new_tokens
    vocabulary.update({token: number for number, token in enumerate(spelled)})
    content["model"]["merges"] += [[spelled[left], spelled[right]] for left, right in merges]
    return Tokenizer.from_str(json.dumps(content))


def save(tokenizer: Tokenizer, special_tokens: SpecialTokens, template: str | None, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template, as transformers' AutoTokenizer reads them."""
    names = {"pad_token": special_tokens.pad, "eos_token": special_tokens.eos, "bos_token": special_tokens.bos}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: token for name, token in names.items() if token is not None},
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


def _chat_template(special_tokens: SpecialTokens) -> str | None:
    """None: the vocabulary has no tokens for chats."""
    file = special_tokens.chat_template
    if file is None:
        return CHAT_TEMPLATE if "<|im_start|>" in special_tokens.chat else None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"special_tokens.chat_template: {file} cannot be read.") from error
