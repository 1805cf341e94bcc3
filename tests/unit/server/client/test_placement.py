"""How many replicas there are, and on which devices."""

import os
import sys

import pytest

from stellarbyte_server.client.placement import place, replica_environments, share_of_each, visible_gpus
from stellarbyte_server.config.setting_values import SettingsError
from stellarbyte_server.config.settings import EngineSettings


def settings(replicas: int | None, device: str = "auto", ranks: int = 1) -> EngineSettings:
    return EngineSettings(model="m", replicas=replicas, device=device, tensor_parallel_size=ranks)


def test_each_replica_has_a_gpu_of_its_own() -> None:
    assert replica_environments(settings(2), ["0", "1", "2"]) == [{"CUDA_VISIBLE_DEVICES": n} for n in "01"]
    assert replica_environments(settings(None), ["GPU-a", "GPU-b"]) == [
        {"CUDA_VISIBLE_DEVICES": "GPU-a"},
        {"CUDA_VISIBLE_DEVICES": "GPU-b"},
    ]
    with pytest.raises(SettingsError, match="--replicas: 3 is more than the 2 GPUs"):
        replica_environments(settings(3), ["0", "1"])


def test_the_ranks_of_a_replica_have_neighbouring_gpus() -> None:
    gpus = ["0", "1", "2", "3", "4"]
    assert replica_environments(settings(None, ranks=2), gpus) == [{"CUDA_VISIBLE_DEVICES": n} for n in ("0,1", "2,3")]
    with pytest.raises(SettingsError, match="--replicas: 2 times --tensor-parallel-size 3 is more than the 5 GPUs"):
        replica_environments(settings(2, ranks=3), gpus)
    with pytest.raises(SettingsError, match="--replicas: 1 times --tensor-parallel-size 8"):
        replica_environments(settings(None, ranks=8), gpus)


def test_without_gpus_replicas_run_on_the_cpu() -> None:
    assert replica_environments(settings(None), []) == [{}]
    assert replica_environments(settings(3), []) == [{}, {}, {}]
    assert visible_gpus(settings(2, "cpu"), os.environ) == []
    assert place(settings(1)) == [{}]


def test_gpus_are_those_that_torch_finds_by_the_names_that_are_visible(tmp_path, monkeypatch) -> None:
    """With a stand-in for Python that says what torch would print."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho a warning\necho 2\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    assert visible_gpus(settings(2), {}) == ["0", "1"]
    assert visible_gpus(settings(2), {"CUDA_VISIBLE_DEVICES": "5, 3,7"}) == ["5", "3"]
    python.write_text("#!/bin/sh\nexit 1\n")
    assert visible_gpus(settings(2), {}) == []


def test_the_queue_is_divided_among_replicas() -> None:
    each = share_of_each(EngineSettings(model="m", replicas=None, max_queued_requests=10), 3)
    assert (each.replicas, each.max_queued_requests) == (3, 4)
    assert share_of_each(settings(1), 1) == settings(1)


@pytest.mark.parametrize(
    ("publish", "replay", "replicas", "said"),
    [
        ("127.0.0.1:5557", "127.0.0.1:5558", 2, "--kv-events-replay: its port must be at least 2 from"),
        ("127.0.0.1:5558", "*:5557", 4, "--kv-events-replay: its port must be at least 4 from"),
        ("*:5557", "*:5557", 1, "--kv-events-replay: its port must be at least 1 from"),
        ("*:65535", None, 2, "--kv-events: 2 replicas need the ports from 65535 on"),
        ("*:5557", "*:5558", 1, None),
        ("*:5557", "*:5561", 4, None),
        ("127.0.0.1:5557", "127.0.0.2:5558", 4, None),
        ("*:65534", None, 2, None),
    ],
)
def test_replicas_have_ports_of_their_own_for_events(
    publish: str, replay: str | None, replicas: int, said: str | None
) -> None:
    replay = None if replay is None else f"tcp://{replay}"
    given = EngineSettings(model="m", kv_events=f"tcp://{publish}", kv_events_replay=replay)
    if said is None:
        assert share_of_each(given, replicas).kv_events == given.kv_events
    else:
        with pytest.raises(SettingsError, match=said):
            share_of_each(given, replicas)
