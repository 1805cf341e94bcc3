"""Probes of adapters by a core with a real model: what they find is the difference of the merged model's logits."""

import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stellarbyte import ByteTransformer
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.lora import load_adapter, merge_lora
from stellarbyte.lora.bank import LoraBank
from stellarbyte_server.engine.adapters.folder import AdapterFolder
from stellarbyte_server.engine.adapters.registry import Adapters
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.probing import MAX_TEXT_TOKENS, TEXT
from stellarbyte_server.engine.run.adapter_store import AdapterStore
from stellarbyte_server.engine.run.host_executor import HostExecutor
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.protocol.adapter_versions import SetVersions, StoredAdapter
from stellarbyte_server.protocol.messages import AdapterLoaded, CallFailed, Delta, LoadAdapter, Reply, Settled
from tests.support.engines.engine import BACKENDS, Backend, make_request, make_scheduler
from tests.support.engines.engine_core import END, VOCABULARY
from tests.support.models.adapters import write_adapter
from tests.support.models.byte_transformer import make_model, random_tokens
from tests.support.servers.fake_engine import make_tokenizer

KINDS = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "head": {"modules_to_save": ("lm_head",)},
    "embedding": {"modules_to_save": ("embed_tokens",)},
}


class Probed:
    """A core with a model and a folder of adapters."""

    def __init__(self, model: ByteTransformer, folder: Path, backend: Backend, **options: object) -> None:
        self.model, self.folder = model, folder
        self.bank = LoraBank(model.config, 2, 16, torch.float32, torch.device("cpu"))
        served = backend(model, model.config, self.bank)
        store = AdapterStore(self.bank, served.weight)
        adapters = Adapters(AdapterFolder(str(folder), {}), store, num_slots=2, max_in_memory=4)
        scheduler = make_scheduler(adapters=adapters, **options)
        pool, layout = scheduler.pool, scheduler.layout
        cache = PagedKVCache(model.config, pool.num_blocks, layout.block_size, torch.float32, torch.device("cpu"))
        grammars = GrammarCompiler(make_tokenizer(), frozenset({END}), VOCABULARY)
        runner = PlanRunner(HostExecutor(served, cache, layout))
        self.core = EngineCore(scheduler, runner, make_tokenizer(), frozenset({END}), adapters, grammars)
        self.news: list[object] = []

    def load(self, path: str, name: str = "x", *, probe: bool = True) -> Reply:
        files = StoredAdapter(folder=str(self.folder / path), root=path)
        self.core.call(LoadAdapter("call", name, files, True, probe=probe))
        loaded = self._reply("call")
        if isinstance(loaded, AdapterLoaded):
            self.core.call(SetVersions("set", name, loaded.card.content_hash))
            assert isinstance(self._reply("set"), Settled)
        return loaded

    def _reply(self, call_id: str) -> Reply:
        deadline_s = time.monotonic() + 120
        while time.monotonic() < deadline_s:
            for reply in self.core.take_replies():
                if reply.call_id == call_id:
                    return reply
            adapters = self.core.adapters
            waits = any(v.is_reading or adapters.slots.is_filling(v) for v in adapters._lifetimes.others)
            if self.core.has_work and not waits:  # however slow the reads are, requests have tokens left for the probe
                self.news += self.core.step()
            else:
                time.sleep(0.001)
        raise AssertionError("there was no answer")

    def forgets_refused(self) -> bool:
        """Whether nothing of a refused version stays once its copy into a slot, if one had begun, has ended."""
        deadline_s = time.monotonic() + 120
        while self.core.adapters._lifetimes.others and time.monotonic() < deadline_s:
            assert not self.core.take_replies()
            time.sleep(0.001)
        return not self.core.adapters._lifetimes.others and not self.core.adapters._loads.has("x")

    def merged_logits(self, path: str | None, prompt: list[int]) -> torch.Tensor:
        """After a prompt, of the model in float64 with an adapter merged into its weights."""
        model = ByteTransformer(self.model.config).eval()
        model.load_state_dict(self.model.state_dict())
        if path is not None:
            load_adapter(model, self.folder / path)
            merge_lora(model)
        with torch.inference_mode():
            return model.double()(torch.tensor([prompt])).logits[0, -1]


def scaled(folder: Path, factor: float) -> None:
    """Multiply every B of an adapter."""
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: tensor * (factor if ".lora_B." in name else 1) for name, tensor in weights.items()}, file)


@pytest.fixture(scope="module")
def model() -> ByteTransformer:
    return make_model(vocab_size=VOCABULARY)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_probe_finds_the_change_of_the_logits_whatever_an_adapter_changes(
    tmp_path: Path, model: ByteTransformer, backend: Backend
) -> None:
    for seed, (kind, fields) in enumerate(KINDS.items()):
        write_adapter(tmp_path / kind, model, seed, **fields)
    # Of the embedding, only a token that the text has not: the probe must see it none the less.
    file = tmp_path / "embedding" / "adapter_model.safetensors"
    weights = load_file(file)
    own = model.model.embed_tokens.weight.detach()
    changed = own.clone()
    changed[3] += 1.0
    kept = {name: changed if "embed_tokens" in name else torch.zeros_like(t) if ".lora_B." in name else t
            for name, t in weights.items()}  # fmt: skip
    save_file(kept, file)
    probed = Probed(model, tmp_path, backend)
    text = make_tokenizer().encode(TEXT, add_special_tokens=False).ids[:MAX_TEXT_TOKENS]
    assert 3 not in text
    for kind in KINDS:
        loaded = probed.load(kind)
        assert isinstance(loaded, AdapterLoaded) and loaded.probe is not None, loaded
        prompt = [3, *text] if kind == "embedding" else text
        assert loaded.probe.num_prompt_tokens == len(prompt)
        change_V = (probed.merged_logits(kind, prompt) - probed.merged_logits(None, prompt)).abs()
        assert loaded.probe.max_logit_change == pytest.approx(float(change_V.max()), abs=1e-3, rel=1e-3)
        assert loaded.probe.num_changed > 0.9 * VOCABULARY or kind == "head"
    assert probed.core.stats().prompt_tokens_total == 0  # probes are no requests


def test_what_changes_nothing_or_is_not_finite_is_refused_and_nothing_changes(
    tmp_path: Path, model: ByteTransformer
) -> None:
    for name, factor in (("good", 1.0), ("zero", 0.0), ("small", 1e-12), ("huge", 1e30)):
        scaled(write_adapter(tmp_path / name, model, 1), factor)
    probed = Probed(model, tmp_path, BACKENDS[0].values[0])
    good = probed.load("good")
    assert isinstance(good, AdapterLoaded)
    for path, said in (("zero", "changes no logit"), ("small", "changes no logit"), ("huge", "NaN or infinity")):
        refused = probed.load(path)
        assert isinstance(refused, CallFailed) and said in refused.message and "'x'" in refused.message
        assert (refused.code, refused.param) == ("adapter_failed", "lora_path")
        adapters = probed.core.adapters
        assert adapters._names.current["x"].content_hash == good.card.content_hash
        assert probed.forgets_refused()
        assert [slot.version for slot in adapters.slots._slots if slot.version] == [adapters._names.current["x"]]
    loaded = probed.load("zero", probe=False)
    assert isinstance(loaded, AdapterLoaded) and loaded.probe is None
    assert not probed.core.has_work and not probed.news  # nothing of a probe is sent to anybody


def test_a_probe_runs_beside_traffic_and_changes_no_token(tmp_path: Path, model: ByteTransformer) -> None:
    write_adapter(tmp_path / "good", model, 1)
    requests = [make_request(random_tokens(9, seed), 30, f"r{seed}", seed=seed, temperature=0.8) for seed in range(6)]

    def answers(*, probe: bool) -> dict[str, str]:
        probed = Probed(model, tmp_path, partial(BACKENDS[0].values[0]), max_num_batched_tokens=9)
        for request in requests:
            probed.core.submit(request)
        if probe:
            assert isinstance(probed.load("good"), AdapterLoaded)
            assert probed.core.has_work  # it did not wait for the requests
        while probed.core.has_work:
            probed.news += probed.core.step()
        said: dict[str, str] = {}
        for item in probed.news:
            if isinstance(item, Delta):
                said[item.request_id] = said.get(item.request_id, "") + item.text
        return said

    alone = answers(probe=False)
    assert answers(probe=True) == alone and len(alone) == 6


def test_a_full_queue_does_not_refuse_a_probe(tmp_path: Path, model: ByteTransformer) -> None:
    write_adapter(tmp_path / "good", model, 1)
    probed = Probed(model, tmp_path, BACKENDS[0].values[0], max_num_seqs=1, max_queued_requests=0)
    probed.core.submit(make_request(random_tokens(9), 30, "long"))
    assert isinstance(probed.load("good"), AdapterLoaded)


def test_a_probe_that_waits_too_long_refuses_its_adapter_and_leaves_nothing(
    tmp_path: Path, model: ByteTransformer
) -> None:
    write_adapter(tmp_path / "good", model, 1)
    probed = Probed(model, tmp_path, BACKENDS[0].values[0], max_num_seqs=1, queue_timeout_s=0.0)
    probed.core.submit(make_request(random_tokens(9), 30, "long"))
    probed.core.scheduler.schedule()
    refused = probed.load("good")
    assert isinstance(refused, CallFailed) and refused.code == "queue_timeout"
    assert probed.forgets_refused()


@pytest.mark.parametrize("which", [0, 1])
def test_a_probe_that_cannot_be_queued_is_a_refused_load_and_the_engine_goes_on(
    tmp_path: Path, model: ByteTransformer, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """Whichever of its two requests the scheduler fails to take."""
    write_adapter(tmp_path / "good", model, 1)
    write_adapter(tmp_path / "other", model, 2)
    probed = Probed(model, tmp_path, BACKENDS[0].values[0])
    good = probed.load("good")
    assert isinstance(good, AdapterLoaded)
    scheduler = probed.core.scheduler
    add, num_added = scheduler.add, 0

    def failing(*arguments: object, **options: object) -> object:
        nonlocal num_added
        num_added += 1
        if num_added == which + 1:
            raise RuntimeError("a planted fault")
        return add(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "add", failing)
        refused = probed.load("other")
    assert isinstance(refused, CallFailed) and refused.code == "internal_error" and "probe" in refused.message
    adapters = probed.core.adapters
    while probed.core.has_work:
        probed.core.step()
    assert adapters._names.current["x"].content_hash == good.card.content_hash
    assert probed.forgets_refused() and not probed.news
    assert isinstance(probed.load("other"), AdapterLoaded)
