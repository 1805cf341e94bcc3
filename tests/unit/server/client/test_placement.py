"""How many replicas there are, and on which devices."""

import os
import sys

import pytest

from stellarbyte_server.client.placement import place, replica_environments, share_of_each, visible_gpus
from stellarbyte_server.config.setting_values import SettingsError
from stellarbyte_server.config.settings import EngineSettings


def settings(replicas: int | None, device: str = "auto") -> EngineSettings:
    return EngineSettings(model="m", replicas=replicas, device=device)


def test_each_replica_has_a_gpu_of_its_own() -> None:
    assert replica_environments(settings(2), ["0", "1", "2"]) == [{"CUDA_VISIBLE_DEVICES": n} for n in "01"]
    assert replica_environments(settings(None), ["GPU-a", "GPU-b"]) == [
        {"CUDA_VISIBLE_DEVICES": "GPU-a"},
        {"CUDA_VISIBLE_DEVICES": "GPU-b"},
    ]
    with pytest.raises(SettingsError, match="--replicas: 3 is more than the 2 GPUs"):
        replica_environments(settings(3), ["0", "1"])


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
