"""Parts of `stellarbyte tune`: files of examples from ratings, the curve of losses, a server that does not answer."""

import io
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stellarbyte_client.errors import ConnectionFailed
from stellarbyte_client.terminal.connection import CommandFailed
from stellarbyte_client.terminal.tune import job_view
from stellarbyte_client.terminal.tune.feedback_file import Format, write_examples
from stellarbyte_client.terminal.tune.job_view import JobView
from stellarbyte_client.terminal.tune.loss_plot import TRAIN, VALID, loss_plot
from stellarbyte_client.terminal.tune.tuning_server import Job, JobEvent, Rated, RatedChoice
from stellarbyte_server.tuning.examples import Template, check_examples
from tests.terminal.command import Command

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ASKED = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "3", "reasoning_content": "Hm."},
    {"role": "user", "content": "Really?"},
]


def rated(rating: str, text: str | None = "Two.", *, finish_reason: str = "stop", **fields: Any) -> Rated:
    message = {"role": "assistant", "content": text, **fields.pop("message", {})}
    given = {"messages": ASKED, "choice": RatedChoice(message=message, finish_reason=finish_reason)} | fields
    return Rated(id="feedback-1", rating=rating, **given)


def written(ratings: list[Rated], path: Path, form: Format) -> tuple[list[Any], Counter[str]]:
    number, left_out = write_examples(ratings, path, form)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == number
    return lines, left_out


RATINGS = [  # the newest first
    rated("bad", answer="2, wirklich"),
    rated("bad"),
    rated("good"),
    rated("good", "Two and", finish_reason="length"),
    rated("good", ""),
    rated("good", None, message={"tool_calls": [CALL]}, tools=[TOOL]),
    rated("bad", messages=None, prompt="1 + 1 =", choice=RatedChoice(text=" 3", finish_reason="stop"), answer=" 2"),
]
CHAT = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "Really?"},
]


def test_good_and_better_answers_become_examples_that_a_server_takes(tmp_path: Path) -> None:
    lines, left_out = written(RATINGS, tmp_path / "out.jsonl", "sft")
    context = [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[2]]
    assert lines == [
        {"prompt": "1 + 1 =", "completion": " 2"},
        {"messages": [*context, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]},
        {"messages": [*context, {"role": "assistant", "content": "Two."}]},
        {"messages": [*context, {"role": "assistant", "content": "2, wirklich"}]},
    ]
    assert left_out == {"without a better answer": 1, "cut off by length": 1, "empty": 1}
    with open(tmp_path / "out.jsonl", "rb") as file:
        assert check_examples(file, io.BytesIO(), Template(shows_tools=True, shows_calls=True)) == (4, [])
    with pytest.raises(CommandFailed, match=r"out\.jsonl already exists; give another name\."):
        write_examples(RATINGS, tmp_path / "out.jsonl", "sft")


def test_better_answers_become_preference_data_in_both_forms(tmp_path: Path) -> None:
    lines, left_out = written(RATINGS, tmp_path / "dpo.jsonl", "dpo")
    rejected = {"role": "assistant", "content": "Two."}
    assert lines == [
        {
            "input": {"messages": [{"role": "user", "content": "1 + 1 ="}]},
            "preferred_output": [{"role": "assistant", "content": " 2"}],
            "non_preferred_output": [{"role": "assistant", "content": " 3"}],
        },
        {
            "input": {"messages": CHAT},
            "preferred_output": [{"role": "assistant", "content": "2, wirklich"}],
            "non_preferred_output": [rejected],
        },
    ]
    assert left_out == {"without a better answer": 5}
    lines, _ = written(RATINGS, tmp_path / "trl.jsonl", "trl")
    assert lines == [
        {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"},
        {"prompt": CHAT, "chosen": [{"role": "assistant", "content": "2, wirklich"}], "rejected": [rejected]},
    ]


def test_a_curve_falls_from_the_first_line_to_the_last() -> None:
    train = [(float(step), 3 - step / 50) for step in range(101)]
    lines = loss_plot(train, [(0.0, 3.0), (100.0, 1.5)], 40, 5)
    assert [line.partition(" ┤")[0].strip() for line in lines] == ["3.00", "", "", "", "1.00"]
    cells = [line.partition("┤")[2] for line in lines]
    assert cells[0][0] == VALID and cells[0][1] == TRAIN  # the last loss of a place is on top
    columns = [[place for place, cell in enumerate(row) if cell == TRAIN] for row in cells]
    assert all(max(upper) < min(lower) for upper, lower in itertools.pairwise(columns))
    assert sum(map(len, columns)) == 34 - 1  # each of the columns has a point
    assert max(map(len, lines)) == 40 and cells[4][-1] == TRAIN
    assert cells[3][33] == VALID


def test_losses_that_are_equal_infinite_or_missing_have_a_curve_too() -> None:
    assert loss_plot([], [], 40, 5) == []
    assert loss_plot([(1.0, float("nan"))], [], 40, 5) == []
    (first, *_, last) = loss_plot([(1.0, 2.0), (2.0, float("inf"))], [], 40, 5)
    assert (first, last) == (f"2.00 ┤{TRAIN}", "2.00 ┤")


class _Server:
    """Calls of a server whose answers are given; None: it does not answer."""

    def __init__(self, *statuses: str | None) -> None:
        self._statuses = list(statuses)

    def job(self, job_id: str) -> Job:
        status = self._statuses.pop(0) if len(self._statuses) > 1 else self._statuses[0]
        if status is None:
            raise ConnectionFailed("The server at x cannot be reached: refused.")
        return Job(id=job_id, status=status, model="m", created_at=0, training_file="file-1")

    def events_since(self, job_id: str, last: str | None) -> list[JobEvent]:
        del job_id
        return [JobEvent(id="e1", message="hello")] if last is None else []


def view(server: _Server, monkeypatch: pytest.MonkeyPatch, *, limit_s: float) -> tuple[JobView, io.StringIO]:
    monkeypatch.setattr(job_view, "LOOK_S", 0.001)
    monkeypatch.setattr(job_view, "LOST_LIMIT_S", limit_s)
    out = io.StringIO()
    job = Job(id="ftjob-1", status="running", model="m", created_at=0, training_file="file-1")
    return JobView(Console(file=out), server, job), out  # type: ignore[arg-type]


def test_a_server_that_answers_again_is_followed_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    followed, out = view(_Server("running", None, None, "running", "succeeded"), monkeypatch, limit_s=60)
    assert followed.follow().status == "succeeded"
    assert out.getvalue() == "hello\n"


def test_a_server_that_does_not_answer_for_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    followed, _ = view(_Server("running", None), monkeypatch, limit_s=0.01)
    with pytest.raises(CommandFailed) as failure:
        followed.follow()
    assert str(failure.value) == (
        "The server at x cannot be reached: refused. Jobs continue when their server starts again: stellarbyte tune"
        " --resume ftjob-1"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give EXAMPLES, or one of --resume, --list, --cancel, --delete, --back and --from-feedback"),
        (("x", "--list"), "argument --list: not allowed with argument EXAMPLES"),
        (("x", "--share", "0.5"), "--share needs --publish"),
        (("--list", "--epochs", "3"), "--epochs needs EXAMPLES"),
        (("--resume", "ftjob-1", "--learning-rate-multiplier", "3"), "--learning-rate-multiplier needs EXAMPLES"),
        (("--back", "x", "--prompt", "Hi"), "--prompt needs EXAMPLES or --resume"),
        (("x", "--exact-match"), "--exact-match needs --validation"),
        (("x", "--format", "dpo"), "--format needs --from-feedback"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    stellarbyte: Command, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        stellarbyte("tune", *arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
