"""benchmarks/training/story.py: its commands are those of the examples, and its counts are right."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.training.long_text import by_position, cost_of_position
from benchmarks.training.story import SMALL, STORIES, Runner, regular_poems
from stellarbyte.train.config.prepare import Prepare
from stellarbyte.train.config.run import LoraRun, Pretrain, Sft
from stellarbyte.train.config.tokenizer import TrainTokenizer
from stellarbyte.train.config.yaml_file import read_yaml
from tests.support.servers.server_process import ROOT

REGULAR = "《月》\n牀前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。"
BROKEN = "《月》\n牀前明月光，疑是地。"


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("is_small", [False, True])
def test_the_stages_fit_each_other(story: str, is_small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads what the one before has written, and the story looks for the models where they are."""
    monkeypatch.chdir(ROOT)
    runner = Runner(story, small=is_small)
    file = {name: ROOT / "examples" / story / f"{name}.yaml" for name in SMALL[story]}
    told = {name: runner.overrides(name) for name in file}
    tokenizer = read_yaml(file["tokenizer"], TrainTokenizer, told["tokenizer"])
    prepare = read_yaml(file["prepare"], Prepare, told["prepare"])
    pretrain = read_yaml(file["pretrain"], Pretrain, told["pretrain"])
    sft = read_yaml(file["sft"], Sft, told["sft"])
    lora = read_yaml(file["lora"], LoraRun, told["lora"])
    assert tokenizer.output == prepare.tokenizer == Path("tokenizers") / runner.name
    assert prepare.output == pretrain.data.shards == Path("data") / runner.name
    assert pretrain.run.dir / "model" == runner.base and sft.model.path == str(runner.base)
    assert sft.run.dir / "model" == runner.chat and lora.model.path == str(runner.chat)
    assert lora.run.output == runner.adapter
    for run in (pretrain, sft, lora):
        assert run.train.batch_tokens % (run.train.micro_batch * run.data.sequence) == 0
    assert pretrain.model.preset == ("tiny-1m" if is_small else {"poet": "poet-30m"}.get(story, "storyteller-47m"))


def test_poems_of_a_scroll_are_counted_by_quarter() -> None:
    """Without the first part, which is the prompt's, and the last, which may be cut."""
    text = "\n\n".join(["李白", *[REGULAR] * 40, *[BROKEN] * 20, REGULAR])
    quarters = regular_poems(text)
    assert sum(quarter["poems"] for quarter in quarters) == 60
    assert sum(quarter["regular"] for quarter in quarters) == 40
    assert [quarter["regular"] == quarter["poems"] > 0 for quarter in quarters[:3]] == [True] * 3
    assert quarters[3]["regular"] < quarters[3]["poems"]


def test_the_cost_of_a_position_is_counted_where_a_row_has_context() -> None:
    """Rows of 4: the first is within the training length, and first halves of rows do not count."""
    alone = np.array([[9.0, 9.0, 2.0, 2.0, 9.0, 9.0, 1.0, 3.0, 9.0, 9.0, 5.0, 1.0]])
    far = np.array([[1.0, 1.0, 7.0, 7.0, 1.0, 1.0, 1.5, 3.0, 1.0, 1.0, 5.0, 1.5]])
    assert cost_of_position(far, alone, 4) == 0.25
    assert [(bucket["tokens"], bucket["loss"]) for bucket in by_position(alone, 5)] == [(5, 6.2), (10, 6.2), (12, 3.0)]
