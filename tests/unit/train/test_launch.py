"""Whole runs in this process: averages, the best model, numbers that are not finite, and what is left on disk."""

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from stellarbyte.checkpoint.info import read_record
from stellarbyte.checkpoint.native import load_model, open_checkpoint
from stellarbyte.cli.main import main
from stellarbyte.lora import load_adapter
from stellarbyte.train.callbacks.ema import Ema
from stellarbyte.train.config.run import LoraRun, Model, Pretrain
from stellarbyte.train.errors import TrainError
from stellarbyte.train.launch import make_trainer, plan_of, train
from stellarbyte.train.parallel.layout import layout_of
from stellarbyte.train.rows import RunData
from stellarbyte.train.sources import chat_rows
from stellarbyte.train.tokenizer.stages import CHAT_TEMPLATE
from stellarbyte.train.trainer import ByteTrainer
from tests.support.models.byte_transformer import make_model, random_tokens
from tests.support.training.byte_tokenizer import NUM_SPECIAL, byte_tokenizer, ids_of
from tests.support.training.processes import MODEL, TRAIN
from tests.support.training.rows import run_data

pytest.importorskip("accelerate")
TOKENS = torch.tensor([random_tokens(20)])


def config(
    folder: Path, *, stop: dict[str, Any] | None = None, run: dict[str, Any] | None = None, **changes: Any
) -> Pretrain:
    return Pretrain.model_validate(
        {
            "run": {"dir": str(folder / "run"), "plots": False} | (run or {}),
            "model": MODEL,
            "data": {"shards": str(folder), "sequence": 24},
            "train": TRAIN | {"ema": None, "epochs": 1.2} | changes,
            "stop": stop or {},
        }
    )


def trained(folder: Path, data: RunData | None = None, **changes: Any) -> str:
    """What the run has shown."""
    console = Console(file=io.StringIO(), width=150)
    data = run_data(folder) if data is None else data
    outcome = train("pretrain", config(folder, **changes), data, resume=False, console=console)
    assert outcome.folder == folder / "run" / "model"
    return console.file.getvalue()


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 40}


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"use_xpos": False},
        {
            "use_xpos": False,
            "max_position_embeddings": 160,
            "rope_parameters": LONGROPE | {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8},
        },
    ],
    ids=["xpos", "rope", "longrope"],
)
def test_a_compiled_run_compiles_its_model_once(tmp_path: Path, model: dict[str, Any]) -> None:
    data, settings = run_data(tmp_path), config(tmp_path, compile=True)
    settings = settings.model_copy(update={"model": Model.model_validate(MODEL | model)})
    layout = layout_of(settings.parallel, 1)
    plan = plan_of(settings, data, layout)
    trainer, guard = make_trainer("pretrain", settings, data, plan, layout, Console(file=io.StringIO()))
    guard.restore()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(trainer.model, backend=backend)
    batch: Any = data.collate([data.train[row] for row in range(2)])
    for _ in range(2):
        compiled(**batch, skip_logits=True)
    assert len(graphs) == 1


def test_the_finished_model_is_the_average_of_all_steps(tmp_path: Path) -> None:
    """decay^n · w_0 + (1 - decay) Σ decay^(n-k) · w_k, from the weights of every checkpoint."""
    trained(tmp_path, ema=0.8, checkpoint_every=1, keep=99)
    steps = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert len(steps) == 6
    weights = [load_file(step / "model.safetensors") for step in steps]
    torch.manual_seed(0)
    from transformers import set_seed

    from stellarbyte.train.models import make_model as make_run_model

    set_seed(0)
    start = make_run_model(config(tmp_path), run_data(tmp_path)).state_dict()
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    averages = load_file(steps[-1] / "ema.safetensors")
    for name, weight in found.items():
        expected = start[name].double()
        for each in weights:
            expected = 0.8 * expected + 0.2 * each[name].double()
        assert (weight.double() - expected).abs().max() < 1e-6
        assert torch.equal(weight, averages[name]) and not torch.equal(weight, weights[-1][name])


def test_averages_are_of_the_trained_parameters_alone(tmp_path: Path) -> None:
    model = make_model()
    model.lm_head.weight.requires_grad_(False)
    ema = Ema(model, 0.5)
    assert "lm_head.weight" not in ema.averages and len(ema.averages) == len(list(model.parameters())) - 1
    with pytest.raises(TrainError, match="has no averages"):
        ema.load(tmp_path)


def test_the_best_model_is_kept_and_patience_survives_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random tokens cannot be learned: the held-out loss grows soon."""
    settings = {"epochs": 40, "lr": 0.03, "evaluate_every": 2, "checkpoint_every": 2, "keep": 1, "warmup": 0}
    data = run_data(tmp_path, held_out=9)
    output = trained(tmp_path, data, stop={"patience": 2}, **settings)
    steps = sorted(int(path.name.rpartition("-")[2]) for path in (tmp_path / "run").glob("checkpoint-*"))
    state = json.loads((tmp_path / "run" / f"checkpoint-{steps[-1]}" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    assert state["max_steps"] == 200 and max(losses) == best + 4 == steps[-1]
    assert steps == [best, best + 4]
    kept = load_file(tmp_path / "run" / f"checkpoint-{best}" / "model.safetensors")
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(found[name], kept[name]) for name in found)
    record = read_record(tmp_path / "run" / "model")
    assert record is not None and abs(record.held_out["eval_loss"] - losses[best]) < 1e-6
    assert "perplexity" in output and "bits per byte" in output and "best" in output

    step, batches = ByteTrainer.training_step, []

    def stopped(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        batches.append(inputs)
        if len(batches) == 4 * (best + 3):
            os.kill(os.getpid(), signal.SIGTERM)
        loss: torch.Tensor = step(self, model, inputs, num_items_in_batch)
        return loss

    again = config(tmp_path / "again", stop={"patience": 2}, **settings)
    console = Console(file=io.StringIO())
    monkeypatch.setattr(ByteTrainer, "training_step", stopped)
    outcome = train("pretrain", again, data, resume=False, console=console)
    assert (outcome.folder, outcome.step, outcome.number) == (None, best + 3, signal.SIGTERM)
    assert train("pretrain", again, data, resume=True, console=console).step == best + 4
    assert found.keys() == (repeated := load_file(tmp_path / "again" / "run" / "model" / "model.safetensors")).keys()
    assert all(torch.equal(found[name], repeated[name]) for name in found)


def test_the_weights_stay_when_a_step_would_not_be_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite gradient in the second batch of step 3 leaves the weights of step 2, and the batches of step 3."""
    step, batches = ByteTrainer.training_step, []

    def poisoned(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss: torch.Tensor = step(self, model, inputs, num_items_in_batch)
        batches.append(inputs)
        if len(batches) == 2 * 4 + 2:
            self.model.model.norm.weight.grad[3] = float("inf")
        return loss

    monkeypatch.setattr(ByteTrainer, "training_step", poisoned)
    with pytest.raises(
        TrainError, match=r"Step 3 would not be finite \(loss .*, gradient norm (inf|nan)\); the weights"
    ) as told:
        trained(tmp_path, checkpoint_every=1, keep=9)
    folder = tmp_path / "run" / "diverged-3"
    assert str(folder) in str(told.value)
    found, expected = (
        load_file(folder / "weights.safetensors"),
        load_file(tmp_path / "run/checkpoint-2/model.safetensors"),
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    kept = load_file(folder / "batches-rank-0.safetensors")
    for number, batch in enumerate(batches[8:12]):
        assert all(
            torch.equal(kept[f"{number}.{name}"], batch[name]) for name in ("input_ids", "labels", "document_ids")
        )


def test_the_check_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ByteTrainer, "compute_loss", lambda _self, model, *_a, **_k: model.lm_head.weight.sum() * float("nan")
    )
    with pytest.raises(TrainError, match="Step 1 would not be finite"):
        trained(tmp_path)
    trained(tmp_path / "unchecked", stop={"nan": False})


def test_what_is_left_is_served_and_says_how_it_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, run_data(tmp_path, held_out=5), run={"plots": True, "track": ["tensorboard"]})
    folder = tmp_path / "run" / "model"
    assert open_checkpoint(folder).config.vocab_size == 97
    model = load_model(folder)
    assert model.config.eos_token_id == 1 and model(TOKENS).logits.isfinite().all()
    card = (folder / "README.md").read_text(encoding="utf-8")
    for part in ("f" * 64, "license: MIT", "6 steps, 1,152 tokens", "torch", "batch_tokens: 192", "perplexity"):
        assert part in card, part
    assert main(["info", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "pretrain, 6 steps, 1,152 tokens, 1.2 epochs" in shown and "sha ffffffffffff, licences: MIT" in shown
    assert main(["info", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"]["data_sha256"] == "f" * 64
    for name in ("loss.png", "learning-rate.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked = [EventAccumulator(str(file)).Reload() for file in (tmp_path / "run").glob("runs/*/events*")]
    (read,) = [each for each in tracked if "train/loss" in each.Tags()["scalars"]]
    assert [scalar.step for scalar in read.Scalars("train/loss")] == list(range(1, 7))


def test_a_second_run_into_the_folder_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"run/model is not empty"):
        trained(tmp_path)


def test_experts_are_balanced_by_every_step(tmp_path: Path) -> None:
    """Biases move by the rate, up where the load is below the mean and down where it is above: in 5 steps, by an odd
    number of rates."""
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "router_selection_bias": True, "router_score": "sigmoid"}
    settings = config(tmp_path, balance_rate=0.01, epochs=1.0).model_copy(
        update={"model": Model.model_validate(MODEL | experts)}
    )
    outcome = train("pretrain", settings, run_data(tmp_path), resume=False, console=Console(file=io.StringIO()))
    assert outcome.folder is not None
    biases = [w for name, w in load_file(outcome.folder / "model.safetensors").items() if "correction_bias" in name]
    assert len(biases) == 2
    for bias in biases:
        moves = bias / 0.01
        assert 0.999 <= moves.abs().max() <= 5.001
        torch.testing.assert_close(moves, moves.round(), atol=1e-3, rtol=0)
    with pytest.raises(TrainError, match=r"train.balance_rate needs model.router_selection_bias"):
        trained(tmp_path / "dense", balance_rate=0.01)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_tokens": 200}, r"train.batch_tokens 200 is not a multiple of 2×24 \(micro_batch × sequence\)"),
        ({"epochs": 0.1}, r"The data has 40 rows of 24 tokens: 0.1 epochs are less than one step of 8 rows"),
        ({"warmup": 6}, r"train.warmup \(6\) must be less than the 6 steps of the run"),
        (
            {"run": {"track": ["trackio"]}},
            "run.track names trackio, which is not installed: .*python.* -m pip install trackio",
        ),
        ({"evaluate_every": 2}, "train.evaluate_every needs held-out data"),
        (
            {"stop": {"patience": 1}, "evaluate_every": 2, "checkpoint_every": 2},
            "stop.patience needs held-out data, of which there is none",
        ),
    ],
)
def test_runs_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(TrainError, match=told):
        trained(tmp_path, **changes)


def test_an_adapter_is_trained_continued_and_read_back(tmp_path: Path) -> None:
    """The base does not change; the folder is in PEFT's format and gives the trained model's logits."""
    base = tmp_path / "base"
    model = make_model()
    model.save_pretrained(base)
    shape = {"path": str(base)}
    (tmp_path / "chats.jsonl").write_text("")
    settings = LoraRun.model_validate(
        {
            "run": {"dir": str(tmp_path / "run"), "plots": False},
            "model": shape,
            "data": {"chats": [str(tmp_path / "chats.jsonl")], "sequence": 24},
            "train": TRAIN | {"ema": None, "epochs": 1.2, "checkpoint_every": 2, "lr": 0.01},
            "lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        }
    )
    console = Console(file=io.StringIO())
    outcome = train("lora", settings, run_data(tmp_path), resume=False, console=console)
    assert outcome.folder == tmp_path / "run" / "adapter"
    checkpoint = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    assert checkpoint and all("lora_" in name for name in checkpoint)
    adapted = load_adapter(load_model(base), outcome.folder)
    before = load_model(base)(TOKENS).logits
    assert torch.equal(before, model(TOKENS).logits)
    assert (adapted(TOKENS).logits - before).abs().max() > 1e-3
    from peft import PeftModel

    torch.testing.assert_close(
        PeftModel.from_pretrained(load_model(base), outcome.folder)(TOKENS).logits,
        adapted(TOKENS).logits,
        atol=1e-5,
        rtol=1e-5,
    )
    assert "base_model" in (outcome.folder / "README.md").read_text(encoding="utf-8")


def test_an_activated_adapter_is_trained_from_its_invocation_on(tmp_path: Path) -> None:
    """PEFT reads it, with the trained model's logits; tokens before the invocation keep the base's."""
    base, file = tmp_path / "base", tmp_path / "chats.jsonl"
    make_model(vocab_size=NUM_SPECIAL + 256).save_pretrained(base)
    byte_tokenizer(template=CHAT_TEMPLATE).save_pretrained(base)
    chats = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(8)]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    settings = LoraRun.model_validate(
        {
            "run": {"dir": str(tmp_path / "run"), "plots": False},
            "model": {"path": str(base)},
            "data": {"chats": [str(file)], "sequence": 96},
            "train": {"batch_tokens": 192, "micro_batch": 2, "lr": 0.01, "epochs": 2},
            "lora": {"r": 4, "invocation": "<|im_start|>assistant\n"},
        }
    )
    outcome = train("lora", settings, chat_rows(settings), resume=False, console=Console(file=io.StringIO()))
    assert outcome.folder is not None
    invocation = ids_of("<|im_start|>assistant\n")
    written = json.loads((outcome.folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["alora_invocation_tokens"] == invocation
    from peft import PeftModel

    before = [5, 6, *invocation, 7, 8, 9]
    tokens = torch.tensor([[*before, *invocation, 10, 11]])
    adapted = load_adapter(load_model(base), outcome.folder)(tokens).logits
    by_peft = PeftModel.from_pretrained(load_model(base), outcome.folder)(tokens).logits
    torch.testing.assert_close(adapted, by_peft, atol=1e-5, rtol=1e-5)
    of_base = load_model(base)(tokens).logits
    assert torch.equal(adapted[:, : len(before)], of_base[:, : len(before)])
    assert (adapted - of_base)[:, len(before) :].abs().max() > 1e-3
