"""The threads that read and copy adapters, with real files and a real bank."""

import os
import re
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stellarbyte.backends.cpu_model import CpuModel
from stellarbyte.backends.torch_model import TorchModel
from stellarbyte.lora.bank import EMBEDDING, HEAD, LoraBank
from stellarbyte_server.engine.adapters.folder import AdapterFolder
from stellarbyte_server.engine.adapters.memory import FillDone, ReadDone
from stellarbyte_server.engine.run import adapter_store
from stellarbyte_server.engine.run.adapter_store import AdapterStore
from stellarbyte_server.engine.run.executor import DeviceLost
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from tests.support.models.adapters import write_adapter
from tests.support.models.byte_transformer import make_model
from tests.support.tools.readable import readable


@pytest.fixture
def version(tmp_path: Path) -> AdapterVersion:
    write_adapter(tmp_path / "a", make_model(), seed=1)
    files = AdapterFolder(str(tmp_path), {}).offered("a")
    assert files is not None
    return AdapterVersion(name="a", files=files)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def wait(store: AdapterStore) -> ReadDone | FillDone:
    done: list[ReadDone | FillDone] = []
    while not done:  # it rings after a result, which may have been taken by then
        assert readable([store.wake_up.fd], 10)
        done += store.finished()
    (only,) = done
    return only


def test_an_adapter_goes_from_disk_to_a_slot_and_leaves_nothing(version: AdapterVersion) -> None:
    bank = LoraBank(make_model().config, 2, 8)
    store = AdapterStore(bank)
    store.read(version)
    done = wait(store)
    assert isinstance(done, ReadDone) and not done.error and len(done.content_hash) == 64
    assert not readable([store.wake_up.fd], 0)
    assert done.rank == 4 and done.num_bytes > 0 and done.matched and done.unmatched == ()
    store.fill(version, 2)
    assert wait(store) == FillDone(version=version, slot=2)
    assert bank.ranks_SLP[2].max() == 4 and bank.numbers_SF[2].any()
    store.clear(2)
    store.forget(version)
    assert not bank.ranks_SLP.any() and not bank.numbers_SF.any()


def offered(folder: Path, name: str, seed: int, rank: int = 4) -> AdapterVersion:
    """An adapter of that name, written into the folder."""
    write_adapter(folder / name, make_model(), seed, rank)
    files = AdapterFolder(str(folder), {}).offered(name)
    assert files is not None
    return AdapterVersion(name=name, files=files)


def read(store: AdapterStore, version: AdapterVersion) -> ReadDone:
    store.read(version)
    done = wait(store)
    assert isinstance(done, ReadDone)
    return done


def test_a_mix_is_the_same_from_parts_in_memory_and_on_disk(tmp_path: Path) -> None:
    a, b = offered(tmp_path, "a", 1), offered(tmp_path, "b", 2, rank=3)
    bank = LoraBank(make_model().config, 2, 8)
    store = AdapterStore(bank)
    mix = AdapterVersion(name="a+b", files=None, parts=((a, 1.0), (b, 0.5)))
    of_disk = read(store, mix)
    assert of_disk.rank == 7 and [done.version for done in of_disk.parts] == [a, b]
    assert all(len(done.content_hash) == 64 for done in of_disk.parts)
    store.fill(mix, 1)
    wait(store)
    for part in (a, b):
        part.content_hash = read(store, part).content_hash
    for part in (a, b):  # what is in memory serves whatever became of the files
        assert part.files is not None
        part.files.weights.unlink()
    again = AdapterVersion(name="a+b", files=None, parts=mix.parts)
    of_memory = read(store, again)
    assert of_memory.parts == () and of_memory.content_hash == of_disk.content_hash
    store.fill(again, 2)
    wait(store)
    assert torch.equal(bank.numbers_SF[1], bank.numbers_SF[2]) and bank.numbers_SF[1].any()
    other = AdapterVersion(name="a+b", files=None, parts=((a, 1.0), (b, 0.25)))
    assert read(store, other).content_hash != of_disk.content_hash


def on_triton(quantization: str) -> Any:
    """The GPU backend, whose weights a machine without a GPU can pack, too."""

    def make(*arguments: Any) -> Any:
        pytest.importorskip("triton", reason="Triton is not installed")
        from stellarbyte.backends.gpu.model import TritonModel

        return TritonModel(*arguments, quantization=quantization)

    return make


BACKENDS: list[Any] = [
    pytest.param(TorchModel, id="torch"),
    *(pytest.param(partial(CpuModel, quantization=q, num_threads=1), id=f"cpu {q}") for q in ("none", "int8", "int4")),
    *(pytest.param(on_triton(q), id=f"triton {q}") for q in ("none", "int8", "fp8")),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_doras_factors_are_those_of_the_weights_as_they_are_served(tmp_path: Path, backend: Any) -> None:
    model = make_model(hidden_size=64, intermediate_size=128)
    write_adapter(tmp_path / "a", model, 1, rank=3, use_dora=True)
    files = AdapterFolder(str(tmp_path), {}).offered("a")
    assert files is not None
    version = AdapterVersion(name="a", files=files)
    bank = LoraBank(model.config, 1, 8)
    served = backend(model, model.config, bank)
    store = AdapterStore(bank, served.weight)
    assert not read(store, version).error
    store.fill(version, 1)
    wait(store)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    keys = ("A.weight", "B.weight", "magnitude_vector")
    for layer, number, name in bank.projections.modules():
        a, b, m = (tensors[f"base_model.model.{name}.lora_{key}"].double() for key in keys)
        changed = served.weight(name).double() + 2 * b @ a
        factors = m / changed.norm(dim=1)
        d = bank.d(1, layer, number)
        assert d is not None
        torch.testing.assert_close(d.double(), factors - 1, rtol=0, atol=1e-5)
        expected = (2 * factors[:, None] * b).T
        torch.testing.assert_close(bank.b(1, layer, number).double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(bank.a(1, layer, slice(number, number + 1)).double(), a)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_and_an_embedding_are_kept_as_what_they_differ_from_the_served(tmp_path: Path, backend: Any) -> None:
    model = make_model(hidden_size=64, intermediate_size=128)
    write_adapter(tmp_path / "a", model, 1, modules_to_save=("lm_head", "embed_tokens"))
    version = AdapterVersion(name="a", files=AdapterFolder(str(tmp_path), {}).offered("a"))
    bank = LoraBank(model.config, 1, 8)
    served = backend(model, model.config, bank)
    store = AdapterStore(bank, served.weight)
    done = read(store, version)
    assert not done.error and done.num_bytes > 2 * 4 * model.config.vocab_size * 64
    store.fill(version, 1)
    wait(store)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert bank.replaced[1].keys() == {HEAD, EMBEDDING}
    for name, change in bank.replaced[1].items():
        expected = tensors[f"base_model.model.{name}.weight"]
        assert (expected - model.get_submodule(name).weight).abs().max() > 0.01
        torch.testing.assert_close(served.weight(name) + change, expected)
    store.clear(1)
    assert not bank.replaced


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "'use_dora' is True"),
    ({"modules_to_save": ("lm_head",)}, r"'modules_to_save' is \['lm_head'\]"),
]


@pytest.mark.parametrize(("fields", "said"), FIELDS)
def test_a_backend_for_plain_lora_refuses_more_by_name(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    write_adapter(tmp_path / "a", make_model(), 1, **fields)
    version = AdapterVersion(name="a", files=AdapterFolder(str(tmp_path), {}).offered("a"))
    refused = read(AdapterStore(LoraBank(make_model().config, 1, 8)), version)
    assert re.search(f"{said}, but only plain LoRA without it is supported", refused.error)


def test_other_copied_modules_are_refused_by_name(tmp_path: Path) -> None:
    model = make_model()
    write_adapter(tmp_path / "a", model, 1, modules_to_save=("input_layernorm",))
    version = AdapterVersion(name="a", files=AdapterFolder(str(tmp_path), {}).offered("a"))
    bank = LoraBank(model.config, 1, 8)
    refused = read(AdapterStore(bank, TorchModel(model, model.config, bank).weight), version)
    assert "modules_to_save has 'input_layernorm', which is no module that can be replaced" in refused.error


def test_a_mix_that_cannot_be_is_refused_in_a_sentence(tmp_path: Path) -> None:
    a, b = offered(tmp_path, "a", 1), offered(tmp_path, "b", 2, rank=5)
    store = AdapterStore(LoraBank(make_model().config, 1, 8))
    mix = AdapterVersion(name="a+b", files=None, parts=((a, 1.0), (b, 1.0)))
    refused = read(store, mix).error
    assert refused == (
        "The mix 'a+b' cannot be loaded: its ranks add up to 9, but at most 8 is supported (--max-lora-rank)."
    )
    b.files.config.write_text("{")
    done = read(store, mix)
    assert "The adapter 'b' cannot be loaded: adapter_config.json" in done.error
    assert [(part.version, bool(part.error)) for part in done.parts] == [(a, False), (b, True)]


def test_unloading_gives_back_the_bytes_that_the_registry_counts(tmp_path: Path) -> None:
    model = make_model(hidden_size=512, intermediate_size=2048)
    write_adapter(tmp_path / "a", model, seed=1, rank=64)
    files = AdapterFolder(str(tmp_path), {}).offered("a")
    assert files is not None
    version = AdapterVersion(name="a", files=files)
    store = AdapterStore(LoraBank(model.config, 2, 64))
    store.read(version)
    done = wait(store)
    store.fill(version, 1)
    wait(store)
    assert isinstance(done, ReadDone) and done.num_bytes > 7_000_000
    before = resident_bytes()
    store.clear(1)
    store.forget(version)
    deadline_s = time.monotonic() + 60  # the thread that copied may not have let go yet
    while before - resident_bytes() < 0.95 * 2 * done.num_bytes and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert before - resident_bytes() > 0.95 * 2 * done.num_bytes


def test_a_large_machine_reads_several_adapters_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on one core; the engine's own thread keeps all of its cores."""
    model, num_threads_before = make_model(), torch.get_num_threads()
    torch.set_num_threads(3)
    bank = LoraBank(model.config, 8, 8)
    folder = AdapterFolder(str(tmp_path), {})
    versions = []
    for i in range(8):
        write_adapter(tmp_path / f"a{i}", model, seed=i)
        files = folder.offered(f"a{i}")
        assert files is not None
        versions.append(AdapterVersion(name=f"a{i}", files=files))
    together, read_adapter = threading.Barrier(4, timeout=20), adapter_store.read_adapter
    threads_in_readers: set[int] = set()

    def wait_and_read(*arguments: Any, **options: Any) -> Any:
        together.wait()
        threads_in_readers.add(torch.get_num_threads())
        return read_adapter(*arguments, **options)

    monkeypatch.setattr(adapter_store, "read_adapter", wait_and_read)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    store = AdapterStore(bank)
    try:
        for version in versions:
            store.read(version)
        done: list[ReadDone | FillDone] = []
        while len(done) < len(versions):
            assert readable([store.wake_up.fd], 20)
            done += store.finished()
        assert {each.version for each in done} == set(versions)
        assert all(isinstance(each, ReadDone) and not each.error for each in done)
        for slot, version in enumerate(versions, 1):
            store.fill(version, slot)
            wait(store)
        assert len({bank.a(slot, 0, slice(0, 3)).sum().item() for slot in range(1, 9)}) == len(versions)
        assert threads_in_readers == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(num_threads_before)  # for threads of other tests


def test_numbers_that_overflow_once_they_are_scaled_are_refused(version: AdapterVersion) -> None:
    config = version.files.config
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 1e300'))
    store = AdapterStore(LoraBank(make_model().config, 1, 8))
    store.read(version)
    done = wait(store)
    assert isinstance(done, ReadDone) and "alpha / r" in done.error


COPY_ERRORS = [
    (RuntimeError("no"), "could not be copied to the device"),
    (torch.OutOfMemoryError(), "no room for the head or the embedding of the adapter 'a'"),
    (torch.AcceleratorError("CUDA error: no"), None),
]


@pytest.mark.parametrize(("error", "said"), COPY_ERRORS)
def test_a_copy_that_fails_is_heard_of(
    version: AdapterVersion, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, said: str | None
) -> None:
    """Otherwise its requests would wait for ever. Of one adapter, unless the device is lost."""
    bank = LoraBank(make_model().config, 1, 8)
    store = AdapterStore(bank)
    store.read(version)
    wait(store)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(bank, "fill", fail)
    store.fill(version, 1)
    if said is None:
        with pytest.raises(DeviceLost):
            wait(store)
    else:
        done = wait(store)
        assert isinstance(done, FillDone) and said in done.error


def test_an_adapter_that_cannot_be_read_for_no_reason_of_its_own_is_the_servers_fault(
    version: AdapterVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(adapter_store, "read_adapter", fail)
    store = AdapterStore(LoraBank(make_model().config, 1, 8))
    store.read(version)
    done = wait(store)
    assert isinstance(done, ReadDone) and done.is_fault and "server's log" in done.error


@pytest.mark.parametrize("priority", [0, 10])
def test_threads_that_may_not_change_their_priority_work_on(
    version: AdapterVersion, monkeypatch: pytest.MonkeyPatch, priority: int
) -> None:
    """A server that was started with `nice` hung: a thread must not become more important than its process."""
    asked: list[int] = []

    def refuse(*arguments: int) -> None:
        asked.append(arguments[-1])
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    monkeypatch.setattr(os, "getpriority", lambda *_: priority)
    store = AdapterStore(LoraBank(make_model().config, 1, 8))
    store.read(version)
    assert isinstance(wait(store), ReadDone)
    assert min(asked) >= priority


def test_slots_that_are_not_used_take_no_memory() -> None:
    """Eight slots of rank 64 for a large model would otherwise take gigabytes."""
    before = resident_bytes()
    bank = LoraBank(make_model().config, 1000, 1024)
    assert bank.numbers_SF.nbytes > 4 * 2**30
    assert resident_bytes() - before < 64 * 2**20
    bank.numbers_SF[7].fill_(1)
    filled = resident_bytes()
    bank.clear(7)
    assert filled - resident_bytes() > 0.9 * bank.numbers_SF[7].nbytes


def test_a_bank_may_hold_bfloat16(version: AdapterVersion) -> None:
    bank = LoraBank(make_model().config, 1, 8, dtype=torch.bfloat16)
    store = AdapterStore(bank)
    store.read(version)
    wait(store)
    store.fill(version, 1)
    wait(store)
    assert bank.a(1, 0, slice(0, 3)).dtype == torch.bfloat16 and bank.a(1, 0, slice(0, 3)).shape[0] == 12


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_became_a_link_out_of_the_folder_is_not_read(
    version: AdapterVersion, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    """It is the very file, so that nothing but where it lies speaks against it."""
    outside = tmp_path_factory.mktemp("outside") / name
    file = version.files.config.parent / name
    file.rename(outside)
    file.symlink_to(outside)
    store = AdapterStore(LoraBank(make_model().config, 1, 8))
    store.read(version)
    done = wait(store)
    assert isinstance(done, ReadDone) and f"{name} cannot be read" in done.error and not done.is_fault


def test_looks_run_on_a_thread_and_a_look_that_fails_finds_nothing() -> None:
    store = AdapterStore(LoraBank(make_model().config, 1, 8))
    found: list[object] = []
    store.look(threading.get_ident, lambda ident: found.append(ident) or [])
    wait(store).note()
    store.look(lambda: 1 // 0, lambda nothing: found.append(nothing) or [])
    wait(store).note()
    assert found[0] != threading.get_ident() and found[1] is None
