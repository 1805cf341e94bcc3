"""Tokenizers in stages. The oracle is tokenizers' own BpeTrainer, which learns in one."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.train.config.sources import Source
from stellarbyte.train.config.tokenizer import SpecialTokens, Splits, Stage, TrainTokenizer
from stellarbyte.train.errors import TrainError
from stellarbyte.train.tokenizer.merges import continue_merges
from stellarbyte.train.tokenizer.stages import first_stage, next_stage, train_tokenizer
from stellarbyte_server.tokens.tokenizer import load_prompt_tokenizer
from tests.support.servers.server_process import ROOT

ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
CODE = (ROOT / "stellarbyte" / "config.py").read_text(encoding="utf-8")
TEXTS = [*ENGLISH.split("\n\n"), *CHINESE.split("\n\n"), *CODE.split("\n\n")]
SPECIAL = SpecialTokens()


def first(vocabulary: int, texts: list[str] = TEXTS) -> Tokenizer:
    return first_stage(texts, Stage(vocabulary=vocabulary), Splits(), SPECIAL)


def test_stages_on_the_same_texts_are_one_stage() -> None:
    """All of it: ids, merges in their order, special tokens, cuts, decoder."""
    staged = first(400)
    for vocabulary in (401, 600, 1100):
        staged = next_stage(staged, TEXTS, Stage(vocabulary=vocabulary))
        assert staged.get_vocab_size() == vocabulary
    assert json.loads(staged.to_str()) == json.loads(first(1100).to_str())


WORDS = st.dictionaries(st.text("abcd", min_size=1, max_size=9), st.integers(1, 30), min_size=1, max_size=25)


def learned(words: dict[str, int], size: int, min_frequency: int) -> tuple[dict[str, int], list[list[str]]]:
    """By BpeTrainer, of whole words."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=min_frequency, initial_alphabet=list("abcd"), show_progress=False
    )
    tokenizer.train_from_iterator((word for word, count in words.items() for _ in range(count)), trainer)
    content = json.loads(tokenizer.to_str())["model"]
    return content["vocab"], content["merges"]


@settings(max_examples=200)
@given(WORDS, st.integers(4, 40), st.integers(1, 5))
def test_merges_are_those_of_bpe_trainer(words: dict[str, int], size: int, min_frequency: int) -> None:
    vocabulary, merges = learned(words, size, min_frequency)
    # If two merges spell one token, BpeTrainer merges a pair in a part of its places only.
    assume(len(merges) == len({"".join(pair) for pair in merges}))
    counted = [(["abcd".index(letter) for letter in word], count) for word, count in words.items()]
    tokens, found = continue_merges(counted, list("abcd"), size, min_frequency)
    spelled = [*"abcd", *tokens]
    assert {token: number for number, token in enumerate(spelled)} == vocabulary
    assert [[spelled[left], spelled[right]] for left, right in found] == merges


def test_two_merges_that_spell_one_token_give_one_id() -> None:
    words = [([0, 1], 9), ([1, 2], 8), ([0, 1, 2], 3), ([0, 3], 4), ([4, 2], 1)]  # ab, bc; then abc = ab+c
    tokens, merges = continue_merges([*words, ([0, 5], 2), ([4, 2], 2)], ["a", "b", "c", "bc", "ab", "bc2"], 9, 2)
    assert len(tokens) == len(set(tokens))
    assert len(merges) > len(tokens)


def test_counts_beyond_32_bits_are_kept_apart() -> None:
    """In BpeTrainer they overflow."""
    words = [([0, 1], 2**40), ([1, 2], 2**40 + 1), ([2, 3], 2**32 - 1), ([3, 0], 2**32)]
    tokens, _ = continue_merges(words, list("abcd"), 8, 1)
    assert tokens == ["bc", "ab", "da", "cd"]


def test_later_stages_keep_ids_and_learn_from_their_own_texts() -> None:
    general = first(600, [ENGLISH])
    chinese = next_stage(general, [CHINESE], Stage(vocabulary=900))
    before, after = general.get_vocab(), chinese.get_vocab()
    assert {token: after[token] for token in before} == before
    assert sorted(after.values()) == list(range(900))
    assert len(chinese.encode(CHINESE).ids) < len(general.encode(CHINESE).ids)
    new = [chinese.decode([number]) for number in range(600, 900)]
    assert sum(any("\u4e00" <= letter <= "\u9fff" for letter in token) for token in new) > 100


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer that was trained in two stages, the second on code alone."""
    folder = tmp_path_factory.mktemp("trained")
    for name, texts in (("prose", ENGLISH + CHINESE), ("code", CODE)):
        (folder / f"{name}.txt").write_text(texts, encoding="utf-8")
    sources = [Source(files=[str(folder / f"{kind}.txt")], kind=kind, separator="\n") for kind in ("prose", "code")]
    stages = [Stage(vocabulary=700), Stage(vocabulary=900, kinds=["code"])]
    train_tokenizer(TrainTokenizer(output=folder / "out", sources=sources, stages=stages))
    return folder / "out"


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(text: str, trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_transformers_and_the_server_read_it_alike(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    server = load_prompt_tokenizer(trained, None, 900)
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<|pad|>", "<|bos|>", "<|eos|>")
    assert tokenizer.convert_tokens_to_ids(["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>"]) == [0, 1, 2, 3]
    for text in ("", CHINESE, CODE, "x<|eos|>"):
        ids = tokenizer(text)["input_ids"]
        assert ids == server.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == server.decode(ids[1:], skip_special_tokens=False) == text
    messages = [
        {"role": "user", "content": "谁?"},
        {"role": "assistant", "content": "我"},
        {"role": "user", "content": "?"},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == server.encode_chat(messages)
    assert server.decode(ids, skip_special_tokens=False) == (
        "<|bos|><|im_start|>user\n谁?<|eos|>\n<|im_start|>assistant\n我<|eos|>\n<|im_start|>user\n?<|eos|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_report_counts_what_encoding_gives(trained: Path) -> None:
    made = json.loads((trained / "report.json").read_text())
    assert made["vocabulary"] == 900
    assert set(made["kinds"]) == {"prose", "code"}
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    for kind, counted in made["kinds"].items():
        assert not counted["is_learned"]
        assert counted["changed_texts"] == counted["unknown_tokens"] == 0
        texts = (trained.parent / f"{kind}.txt").read_text(encoding="utf-8").split("\n")
        sizes = Counter(
            (len(text.encode()), len(tokenizer.encode(text, add_special_tokens=False).ids)) for text in texts
        )
        assert counted["bytes"] <= sum(size * number for (size, _), number in sizes.items()) / 4
        assert 1 < counted["bytes"] / counted["tokens"] < 6
        assert counted["characters"] <= counted["bytes"]


def test_a_tokenizer_that_loses_text_is_reported(tmp_path: Path) -> None:
    from stellarbyte.train.data.files import files_of
    from stellarbyte.train.tokenizer.report import report

    (tmp_path / "a.txt").write_text("ab|ba|xyz|abba", encoding="utf-8")
    files = files_of([Source(files=[str(tmp_path / "a.txt")], separator="|")])
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "?": 2}, [], unk_token="?"))
    (counted,) = report(tokenizer, files).kinds.values()
    assert (counted.texts, counted.bytes, counted.tokens, counted.unknown_tokens) == (4, 11, 11, 3)
    assert counted.changed_texts == 4  # without a decoder, spaces stand between tokens
    assert counted.is_learned


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"stages": [{"vocabulary": 259}]}, "vocabulary 259 of stage 1 must be at least 260: 256 bytes and 4 special"),
        ({"stages": [{"vocabulary": 300}, {"vocabulary": 300}]}, "vocabulary 300 of stage 2 must be above that of the"),
        ({"stages": [{"vocabulary": 300, "kinds": ["verse"]}]}, "kind 'verse' of stage 1 is that of no source; there"),
        ({"special_tokens": {"pad": "<|eos|>"}}, "pad must differ from eos"),
        ({"special_tokens": {"chat": ["<|bos|>"]}}, "every special token must be another text"),
        ({"sample_bytes": 2**31}, "less than or equal to 2147483647"),
    ],
)
def test_settings_that_are_refused(changed: dict[str, object], said: str) -> None:
    given = {"output": "x", "sources": [{"files": ["a.txt"]}], "stages": [{"vocabulary": 300}], **changed}
    with pytest.raises(ValueError, match=said):
        TrainTokenizer.model_validate(given)


def test_texts_that_are_too_few_and_folders_that_are_there(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two one two")
    settings = TrainTokenizer(
        output=tmp_path / "out", sources=[Source(files=[str(tmp_path / "a.txt")])], stages=[Stage(vocabulary=300)]
    )
    with pytest.raises(
        TrainError, match=r"Stage 1 found 2\d\d of 300 tokens; give more text, a smaller vocabulary, or"
    ):
        train_tokenizer(settings)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(TrainError, match=r"Stage 1 has no text to learn from\."):
        train_tokenizer(settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="is not empty"):
        train_tokenizer(settings.model_copy(update={"output": trained}))


PEAK = """
import resource, sys
from stellarbyte.train.config.tokenizer import TrainTokenizer
from stellarbyte.train.tokenizer.stages import train_tokenizer
train_tokenizer(TrainTokenizer.model_validate_json(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_grows_with_the_sample_and_not_with_the_texts(tmp_path: Path) -> None:
    """Texts of 2 and 8 MB of words that occur once; samples of 1 MiB."""
    peaks = []
    for size in (2, 8):
        file = tmp_path / f"{size}.txt"
        with file.open("w") as opened:
            for number in range(size * 100):
                opened.write(" ".join(f"w{number * 1000 + i:x}".translate(LETTERS) for i in range(1000)) + "\n\n")
        given = {
            "output": str(tmp_path / f"out-{size}"),
            "sources": [{"files": [str(file)], "separator": "\n\n"}],
            "stages": [{"vocabulary": 300}, {"vocabulary": 320}],
            "sample_bytes": 1 << 20,
        }
        ran = subprocess.run(
            [sys.executable, "-c", PEAK, json.dumps(given)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "RAYON_NUM_THREADS": "1"},
        )
        peaks.append(int(ran.stdout) >> 10)
    assert peaks[1] - peaks[0] < 25, peaks


LETTERS = str.maketrans("0123456789", "ghijklmnop")  # digits would be cut apart


STOPPED = """
import os, signal, sys, threading
from pathlib import Path
from stellarbyte.cli.main import main
from stellarbyte.train.tokenizer import stages

class Trained:
    def train_from_iterator(self, texts, trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()  # as if it took for ever

stages.Tokenizer = lambda model: Trained()
stages.pretokens.install = lambda tokenizer, splits: None
sys.exit(main(["train", "tokenizer", sys.argv[1]]))
"""


def test_sigterm_ends_the_program_while_tokens_are_learned(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two one two")
    given = {"output": str(tmp_path / "out"), "sources": [{"files": [str(tmp_path / "a.txt")]}]}
    (tmp_path / "a.yaml").write_text(json.dumps({**given, "stages": [{"vocabulary": 300}]}))
    ran = subprocess.run([sys.executable, "-c", STOPPED, str(tmp_path / "a.yaml")], capture_output=True, text=True)
    assert ran.returncode == 128 + signal.SIGTERM, ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "out").exists()
