"""Adapters for tests: random ones with known answers, their files, and a store without threads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stellarbyte import ByteModelConfig, ByteTransformer
from stellarbyte.lora import LoRAConfig, apply_lora_to_model, save_adapter
from stellarbyte.lora.bank import PackedAdapter, pack_adapter
from stellarbyte.model.parts import adaptable_modules
from stellarbyte_server.engine.adapters.folder import CONFIG_FILE, WEIGHTS_FILE
from stellarbyte_server.engine.adapters.memory import FillDone, Looked, ReadDone
from stellarbyte_server.engine.adapters.registry import Adapters
from stellarbyte_server.engine.state.adapter_version import AdapterFiles, AdapterVersion
from stellarbyte_server.protocol.messages import AdapterCard, AdapterList

NOWHERE = Path("nowhere")
NO_FILES = AdapterFiles(config=NOWHERE, weights=NOWHERE, root=NOWHERE, asked="nowhere", shown="nowhere")


@dataclass(frozen=True)
class RandomAdapter:
    """Random weights for some modules of a model, each with its own rank and scale."""

    weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # module → A [r, in], B [out, r]
    scales: Mapping[str, float]
    factors: Mapping[str, torch.Tensor]  # of rows [out], with DoRA
    replaced: Mapping[str, torch.Tensor] = field(
        default_factory=dict
    )  # what its head and embedding differ from the model's [V, C]

    def packed(self, config: ByteModelConfig, dtype: torch.dtype = torch.float32) -> PackedAdapter:
        replaced = {module: matrix.to(dtype) for module, matrix in self.replaced.items()}
        return pack_adapter(self.weights, self.scales, config, dtype, self.factors, replaced)


def random_adapter(
    config: ByteModelConfig,
    seed: int,
    ranks: tuple[int, ...] = (1, 4, 7, 16),
    share: float = 1.0,
    size: float = 0.3,
    dora: float = 0.0,
    replaced: tuple[str, ...] = (),
) -> RandomAdapter:
    """Ranks are drawn from `ranks` for every module, and so are whether it is adapted, with chance `share`, and whether
    with DoRA, with chance `dora`."""
    numbers = torch.Generator().manual_seed(seed)
    weights, scales, factors = {}, {}, {}
    for module, (out, width) in adaptable_modules(config).items():
        rank = ranks[int(torch.randint(len(ranks), (), generator=numbers))]
        if torch.rand((), generator=numbers) > share:
            continue
        a = torch.randn(rank, width, generator=numbers) * width**-0.5
        b = torch.randn(out, rank, generator=numbers) * size * rank**-0.5
        weights[module], scales[module] = (a, b), 0.5 + float(torch.rand((), generator=numbers))
        if dora and torch.rand((), generator=numbers) < dora:
            factors[module] = 0.5 + torch.rand(out, generator=numbers)
    matrix = config.vocab_size, config.hidden_size
    changes = {module: 0.02 * torch.randn(matrix, generator=numbers) for module in replaced}
    return RandomAdapter(weights, scales, factors, changes)


def merged(model: ByteTransformer, adapter: RandomAdapter, scale: float = 1.0) -> ByteTransformer:
    """A model of its own whose weights are W + scale · (alpha / r) · B A; with factors f of rows,
    W + scale · (f ⊙ (W + (alpha / r) · B A) - W)."""
    copy = ByteTransformer(model.config).eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for module, (a, b) in adapter.weights.items():
            weight = copy.get_submodule(module).weight
            own = model.get_submodule(module).weight.double()
            changed = own + (b.double() @ a.double()) * adapter.scales[module]
            if module in adapter.factors:
                changed = adapter.factors[module].double()[:, None] * changed
            weight.copy_((own + scale * (changed - own)).float())
        for module, change in adapter.replaced.items():
            copy.get_submodule(module).weight.add_(change, alpha=scale)
    return copy


def write_adapter(
    folder: Path,
    model: ByteTransformer,
    seed: int,
    rank: int = 4,
    size: float = 1.0,
    *,
    use_dora: bool = False,
    modules_to_save: tuple[str, ...] = (),
    invocation: tuple[int, ...] | None = None,
) -> Path:
    """A PEFT folder of a random adapter of all linear modules; `model` is left as it was."""
    copy = ByteTransformer(model.config).eval()
    copy.load_state_dict(model.state_dict())
    config = LoRAConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        use_dora=use_dora,
        modules_to_save=modules_to_save,
        alora_invocation_tokens=invocation,
    )
    apply_lora_to_model(copy, config)
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if ".lora_magnitude_vector." in name:
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=numbers))
            elif ".modules_to_save." in name:
                parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape, generator=numbers))
            elif ".lora_" in name:
                spread = size * (parameter.shape[1] ** -0.5)
                parameter.copy_(torch.randn(parameter.shape, generator=numbers) * spread)
    save_adapter(copy, folder)
    return folder


def touch_adapter(folder: Path) -> Path:
    """Files with the names of an adapter's, for tests that read none."""
    folder.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).touch()
    return folder


def listed(adapters: Adapters) -> tuple[AdapterCard, ...]:
    """All cards, as of a folder that is looked at now, if its last look is old."""
    replies = adapters.list_all("list") or adapters.collect()
    (found,) = [reply for reply in replies if isinstance(reply, AdapterList)]
    return found.cards


def _shown(version: AdapterVersion) -> str:
    assert version.files is not None
    return version.files.shown


@dataclass
class FakeStore:
    """Looks, reads and copies end when the test says so; what a file holds is its version's `files.shown`."""

    looks: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = field(default_factory=list)
    reads: list[AdapterVersion] = field(default_factory=list)
    fills: list[tuple[AdapterVersion, int]] = field(default_factory=list)
    in_memory: set[AdapterVersion] = field(default_factory=set)
    in_slots: dict[int, AdapterVersion] = field(default_factory=dict)
    content: Callable[[AdapterVersion], str] = lambda version: f"hash of {_shown(version)}"
    errors: dict[str, str] = field(default_factory=dict)  # name → why it cannot be read
    fill_errors: dict[str, str] = field(default_factory=dict)  # name → why it cannot be copied to a slot
    wake_up = None

    def close(self) -> None:
        """There is nothing to stop."""

    def look(self, look: Callable[[], Any], note: Callable[[Any], Any]) -> None:
        self.looks.append((look, note))

    def read(self, version: AdapterVersion) -> None:
        self.reads.append(version)

    def fill(self, version: AdapterVersion, slot: int) -> None:
        assert version in self.in_memory
        self.fills.append((version, slot))

    def clear(self, slot: int) -> None:
        self.in_slots.pop(slot, None)

    def forget(self, version: AdapterVersion) -> None:
        self.in_memory.discard(version)

    def _read(self, version: AdapterVersion) -> ReadDone:
        if error := self.errors.get(version.name):
            return ReadDone(version=version, seconds=0.01, error=error)
        content_hash = self.content(version)
        return ReadDone(version=version, seconds=0.01, content_hash=content_hash, num_bytes=100, rank=4)

    def _mix(self, version: AdapterVersion) -> ReadDone:
        """Its content is that of the parts, those in memory as they were read, with their scales."""
        hashes = {part: part.content_hash for part, _ in version.parts if part in self.in_memory}
        read = [self._read(part) for part, _ in version.parts if part not in hashes]
        hashes |= {done.version: done.content_hash for done in read}
        error = next((done.error for done in read if done.error), self.errors.get(version.name, ""))
        content = " + ".join(f"{scale} {hashes[part]}" for part, scale in version.parts)
        return ReadDone(version=version, seconds=0.01, error=error, content_hash=content, rank=8, parts=tuple(read))

    def finished(self) -> list[ReadDone | FillDone | Looked]:
        """Everything that was started."""
        done: list[ReadDone | FillDone | Looked] = [Looked(partial(note, look())) for look, note in self.looks]
        for version in self.reads:
            read = self._mix(version) if version.parts else self._read(version)
            if not read.error:
                self.in_memory.add(version)
            done.append(read)
        for version, slot in self.fills:
            if error := self.fill_errors.get(version.name):
                done.append(FillDone(version=version, slot=slot, error=error))
                continue
            self.in_slots[slot] = version
            done.append(FillDone(version=version, slot=slot))
        self.looks, self.reads, self.fills = [], [], []
        return done
