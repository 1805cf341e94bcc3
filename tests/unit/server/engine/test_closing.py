"""Engine cores in turn leave no open files."""

import gc
import os
from pathlib import Path

from stellarbyte.lora.bank import LoraBank
from stellarbyte_server.engine.adapters.folder import AdapterFolder
from stellarbyte_server.engine.adapters.registry import Adapters
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.events.form import CacheKind
from stellarbyte_server.engine.events.publisher import EventAddresses, EventPublisher
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.run.adapter_store import AdapterStore
from stellarbyte_server.engine.state.cache_log import CacheLog
from stellarbyte_server.wake_up import WakeUp
from tests.support.engines.engine import make_request, make_scheduler
from tests.support.engines.engine_core import END, VOCABULARY, Script
from tests.support.models.byte_transformer import make_model
from tests.support.servers.fake_engine import make_tokenizer
from tests.support.servers.server_process import free_port
from tests.support.tiers.offload_engine import NAMES, make_cache, make_offload
from tests.support.tools.readable import readable

KIND = CacheKind(medium="CPU", window=None)
NUM_CORES = 3


def make_core(folder: Path) -> EngineCore:
    """A core with all parts that open files, which has answered a request with a grammar."""
    offload = make_offload(make_cache(NAMES, 64, 4), folder=folder / "blocks")
    adapters = Adapters(
        AdapterFolder(None, {}), AdapterStore(LoraBank(make_model().config, 1, 8)), num_slots=1, max_in_memory=2
    )
    scheduler = make_scheduler(tiers=offload, adapters=adapters, num_blocks=64, block_size=4)
    tokenizer, ends = make_tokenizer(), frozenset({END})
    events = EventPublisher(CacheLog(), KIND, EventAddresses(publish=f"tcp://127.0.0.1:{free_port()}"))
    events.start()
    grammars = GrammarCompiler(tokenizer, ends, VOCABULARY)
    core = EngineCore(scheduler, Script("a$"), tokenizer, ends, adapters, grammars, events=events, offload=offload)
    core.submit(make_request([1] * 9, 4, grammar='start: "a"'))
    finished: list[str] = []
    while not finished:
        if not core.has_work:
            assert readable(core.wake_fds, 20)
        core.take_replies()
        finished = [item.finish_reason for item in core.step() if getattr(item, "finish_reason", None)]
    assert finished == ["stop"]
    return core


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_cores_close_what_they_open(tmp_path: Path) -> None:
    make_core(tmp_path).close()  # what the process opens once
    before = open_files()
    cores = []
    for _ in range(NUM_CORES):
        cores.append(make_core(tmp_path))
        assert open_files() > before + 8
        cores[-1].close()
        assert open_files() == before


def test_a_wake_up_that_is_closed_or_forgotten_writes_to_no_other_file(tmp_path: Path) -> None:
    before = open_files()
    wake_up = WakeUp()
    wake_up.ring()
    assert readable([wake_up.fd], 0)
    wake_up.clear()
    assert not readable([wake_up.fd], 0)
    wake_up.close()
    files = [(tmp_path / str(number)).open("w+b") for number in range(2)]  # with the numbers that are free again
    assert wake_up.fd in [file.fileno() for file in files]
    wake_up.ring()
    wake_up.close()
    for file in files:
        assert file.read() == b""
        file.close()
    WakeUp().ring()
    assert open_files() == before
