"""Ranks that die, fail alone, or fail together; and a rank 0 that is killed."""

import functools
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stellarbyte.lora.bank import LoraBank
from stellarbyte.parallel.group import GlooGroup
from stellarbyte.parallel.shares import RankShare
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.ranks import executor as executor_module
from stellarbyte_server.engine.ranks import processes as processes_module
from stellarbyte_server.engine.ranks.executor import RanksExecutor
from stellarbyte_server.engine.ranks.follower import Follower
from stellarbyte_server.engine.ranks.messages import (
    Connect,
    FinishStep,
    RankLoaded,
    RankMeasured,
    RankServes,
    RankStart,
    ReadStep,
    Recover,
    StartStep,
    StepFailed,
)
from stellarbyte_server.engine.ranks.processes import RankLost, RankProcesses
from stellarbyte_server.engine.run.executor import DeviceLost
from stellarbyte_server.engine.run.step_plan import Finish, StepPlan
from stellarbyte_server.engine.start import ranks as ranks_module
from stellarbyte_server.engine.start.load import build_core
from stellarbyte_server.engine.start.model_folder import open_model_folder
from stellarbyte_server.engine.start.ranks import LoadedRanks, refuse_ranks
from stellarbyte_server.engine.start.serving_plan import StartupError
from tests.support.models.byte_transformer import EXPERTS, make_config, make_model
from tests.support.servers.fake_engine import make_tokenizer
from tests.support.servers.processes import assert_gone

SCRIPTED = "tests.support.servers.scripted_rank"


class Group:
    """Two ranks, of which rank 1 follows a script; `lost` is set when the group would end."""

    def __init__(self, script: str, module: str = SCRIPTED) -> None:
        self.lost = threading.Event()
        start = RankStart(settings=EngineSettings(model=script), rank=1, num_threads=1)
        self.others = RankProcesses([start], module, self.lost.set)


@pytest.fixture
def start_group() -> Iterator[Callable[..., Group]]:
    started: list[Group] = []

    def start(*told: str) -> Group:
        started.append(Group(*told))
        return started[-1]

    yield start
    for group in started:
        group.others.close()


class Steps:
    """An executor whose steps fail or do not."""

    cache: Any = None
    num_steps_ahead = 0
    takes_drafts = False

    def __init__(self, error: Exception | None = None, position: int = 0) -> None:
        self.error = error
        self.position = position
        self.done: list[str] = []

    def start(self, _plan: StepPlan) -> Any:
        self._do("start")
        return self

    def finish(self, _finish: Finish) -> None:
        self._do("finish")

    def result(self) -> None:
        self.done.append("result")

    def recover(self) -> None:
        self.done.append("recover")

    def prepare(self) -> bool:
        return False

    def _do(self, what: str) -> None:
        self.done.append(what)
        if self.error is not None:
            raise self.error


def test_the_death_of_a_rank_ends_the_group_with_one_line(start_group, caplog: pytest.LogCaptureFixture) -> None:
    group = start_group("serves")
    group.others.answers(RankLoaded)
    group.others.serve()
    os.kill(group.others.process_ids[0], signal.SIGKILL)
    assert group.lost.wait(30)
    (line,) = caplog.messages
    assert line == "tensor-parallel rank 1 of 2 has ended (killed by signal 9); the engine ends with it"


def test_a_rank_that_dies_while_it_loads_is_named(start_group, caplog: pytest.LogCaptureFixture) -> None:
    group = start_group("serves", "tests.no_such_module")
    with pytest.raises(RankLost, match=r"^tensor-parallel rank 1 of 2 has ended \(exit status 1\)$"):
        group.others.answers(RankLoaded)
    assert not group.lost.is_set() and not caplog.messages


def test_a_rank_that_dies_while_the_ranks_meet_ends_the_start(start_group, caplog: pytest.LogCaptureFixture) -> None:
    """Although rank 0 waits for it in a library, without a limit."""
    group = start_group("serves")
    group.others.answers(RankLoaded)
    killing = threading.Timer(0.2, os.kill, (group.others.process_ids[0], signal.SIGKILL))
    killing.start()
    with pytest.raises(RankLost, match=r"^tensor-parallel rank 1 of 2 has ended \(killed by signal 9\)$"):
        group.others.while_all_live(threading.Event().wait, 60)
    assert not group.lost.is_set() and not caplog.messages


def test_a_start_that_a_rank_ends_is_one_sentence_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(ranks_module, "RankProcesses", functools.partial(RankProcesses, module=SCRIPTED))
    with pytest.raises(StartupError, match=r"^tensor-parallel rank 1 of 2 has ended \(exit status 3\)\.$"):
        build_core(EngineSettings(model=str(tmp_path / "model"), device="cpu", tensor_parallel_size=2))
    assert not list((tmp_path / "temporary").iterdir())


def test_ranks_that_do_not_meet_in_time_end_the_start(start_group) -> None:
    group = start_group("serves")
    with pytest.raises(RankLost, match=r"^the 2 tensor-parallel ranks have not met within 0\.1 s$"):
        group.others.while_all_live(threading.Event().wait, 0.1)


def test_an_error_of_the_meeting_is_that_of_rank_0_while_all_ranks_live(
    start_group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes_module, "_NOTICE_S", 0.1)
    group = start_group("serves")
    done: list[int] = []
    group.others.while_all_live(lambda: done.append(1), 60)
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        group.others.while_all_live(lambda: done.append(1 // 0), 60)


def test_a_rank_meets_the_others_only_when_all_have_loaded(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    settings = EngineSettings(model=str(tmp_path), device="cpu", dtype="float32", tensor_parallel_size=2)
    others = RankProcesses([RankStart(settings=settings, rank=1, num_threads=1)])
    try:
        others.answers(RankLoaded)
        store = tmp_path / "store"
        with pytest.raises(RankLost, match="has not answered"):
            others.answers(RankMeasured, 0.5)
        assert not store.exists()
        others.send(Connect(str(store)))
        others.while_all_live(lambda: GlooGroup(0, 2).connect(store), 60)
        (measured,) = others.answers(RankMeasured, 60)
        assert measured.cache_bytes > 0 and not measured.no_symmetric_memory
    finally:
        others.close()


def test_why_a_rank_has_no_symmetric_memory_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Only the log of rank 0 is seen."""
    said = [[RankMeasured(1000, "GPU 1 has no atomic operations in the memory of GPU 0")], [RankServes()]]
    others = SimpleNamespace(answers=lambda _: said.pop(0), send=lambda _: None, serve=lambda: None)
    plan = SimpleNamespace(max_model_len=1, cache=SimpleNamespace(num_blocks=1))
    start = SimpleNamespace(cache_bytes=lambda: 1000, plan=lambda _: plan, executor=lambda *_: Steps())
    group = SimpleNamespace(no_symmetric_memory="another rank has none")
    ranks: Any = LoadedRanks
    with caplog.at_level(logging.INFO):
        ranks(own=SimpleNamespace(start=start), group=group, others=others, bank=None).serve()
    assert [line for line in caplog.messages if "symmetric" in line] == [
        "tensor-parallel rank 0 sums through NCCL alone: no symmetric memory (another rank has none)",
        "tensor-parallel rank 1 sums through NCCL alone: no symmetric memory"
        " (GPU 1 has no atomic operations in the memory of GPU 0)",
    ]


def test_a_rank_that_says_nothing_is_named(start_group) -> None:
    group = start_group("serves")
    with pytest.raises(RankLost, match=r"rank 1 of 2 has not answered for 0\.1 s"):
        group.others.answers(RankServes, 0.1)


def test_a_step_that_fails_on_all_ranks_is_an_error_of_the_step(start_group) -> None:
    group = start_group("fails")
    group.others.serve()
    own = Steps(ZeroDivisionError("of the step"))
    executor = RanksExecutor(own, group.others)
    with pytest.raises(ZeroDivisionError):
        executor.start(StepPlan())
    executor.recover()
    assert own.done == ["start", "recover"]
    assert not group.lost.is_set()


def test_a_step_that_fails_at_different_places_of_the_ranks_loses_the_device(start_group) -> None:
    """Else the next sum of one rank would meet an older one of another."""
    group = start_group("fails")
    group.others.serve()
    executor = RanksExecutor(Steps(ZeroDivisionError("of the step"), position=3), group.others)
    with pytest.raises(DeviceLost, match="at different places"):
        executor.start(StepPlan())


def test_a_step_that_fails_on_rank_0_alone_loses_the_device(start_group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "AGREE_LIMIT_S", 0.2)
    executor = RanksExecutor(Steps(ZeroDivisionError("of the step")), start_group("serves").others)
    with pytest.raises(DeviceLost, match="on rank 0, but not on all ranks"):
        executor.start(StepPlan())


def test_a_step_that_fails_on_another_rank_alone_ends_the_group(
    start_group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes_module, "AGREE_LIMIT_S", 0.2)
    group = start_group("fails")
    group.others.serve()
    RanksExecutor(Steps(), group.others).start(StepPlan())
    assert group.lost.wait(30)
    (line,) = caplog.messages
    assert line == "tensor-parallel rank 1 of 2 failed alone in a step: RuntimeError: as told; the engine ends with it"


def test_a_follower_reports_an_error_and_goes_on() -> None:
    own, said = Steps(ZeroDivisionError("of the step")), []
    follower = Follower(own, LoraBank(make_config()), said.append)
    follower.take(StartStep(StepPlan()))
    (failed,) = said
    assert isinstance(failed, StepFailed) and failed.error.endswith("ZeroDivisionError: of the step")
    own.error = None
    for message in (Recover(), StartStep(StepPlan()), FinishStep(Finish()), ReadStep()):
        follower.take(message)
    assert own.done == ["start", "recover", "start", "finish", "result"]
    assert len(said) == 1


def test_when_rank_0_is_killed_the_others_end(tmp_path: Path) -> None:
    """Rank 1 has loaded its model and waits for rank 0 to meet it."""
    make_model().save_pretrained(tmp_path)
    code = f"""
import sys
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.ranks.messages import RankLoaded, RankStart
from stellarbyte_server.engine.ranks.processes import RankProcesses
settings = EngineSettings(model={str(tmp_path)!r}, device="cpu", dtype="float32", tensor_parallel_size=2)
others = RankProcesses([RankStart(settings=settings, rank=1, num_threads=1)])
others.answers(RankLoaded)
print(others.process_ids[0], flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code]
    rank_0 = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert rank_0.stdout is not None
        rank_1 = int(rank_0.stdout.readline())
        os.kill(rank_1, 0)  # it is there
    finally:
        rank_0.kill()
        rank_0.communicate()
    assert_gone([rank_1])


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        ({"tensor_parallel_size": 3}, {}, "^--tensor-parallel-size 3: 3 ranks cannot divide 4 query heads .*[^.]\\.$"),
        ({"tensor_parallel_size": 8}, EXPERTS | {"num_key_value_heads": 4, "num_attention_heads": 8}, "num_experts"),
        ({"tensor_parallel_size": 2, "quantization": "int8"}, {}, "cannot be used with --quantization int8"),
        ({"tensor_parallel_size": 2, "deterministic": True}, {}, "cannot be used with --deterministic"),
        ({"tensor_parallel_size": 2, "kv_cache_memory": 1000}, {}, "one sequence at full length needs"),
    ],
)
def test_what_cannot_be_served_ends_the_start_in_one_sentence(flags, changes, message: str, tmp_path: Path) -> None:
    model = make_model(**changes)
    model.save_pretrained(tmp_path)
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(StartupError, match=message) as refused:
        build_core(EngineSettings(model=str(tmp_path), device="cpu", **flags))
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


def test_random_weights_of_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    make_config(attention_output_bias=True).save_pretrained(tmp_path)
    folder = open_model_folder(tmp_path, is_dummy=True)
    whole = folder.language_model(torch.float32, torch.device("cpu")).state_dict()
    for rank in range(2):
        share = RankShare(config=folder.config, rank=rank, ranks=2)
        own = folder.rank_model(share, GlooGroup(rank, 2), torch.float32).state_dict()
        assert own.keys() == whole.keys()
        for name, piece in share.pieces().items():
            expected = torch.zeros_like(own[name]) if piece.is_zero else whole[name][piece.index]
            assert torch.equal(own[name], expected), name


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({}, {}, "^--tensor-parallel-size 2 needs a GPU for each rank, but torch finds 1\\.$"),
        (EXPERTS, {}, "^--tensor-parallel-size 2 needs --device cpu for a model with experts: "),
        ({}, {"deterministic": True}, "cannot be used with --deterministic"),
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, {}, "2 ranks cannot divide 3 query heads"),
    ],
)
def test_what_ranks_on_gpus_cannot_serve_is_refused(
    changes, flags, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings = EngineSettings(model="m", tensor_parallel_size=2, **flags)
    with pytest.raises(StartupError, match=message):
        refuse_ranks(settings, make_config(**changes), torch.device("cuda"))
