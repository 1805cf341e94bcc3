"""Adapters in PEFT's files: read for serving, read into a model and written from one.

Files are untrusted: nothing is unpickled, headers are checked before tensors are read, and no message contains a
folder.
"""

import dataclasses
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.safetensors_file import DTYPES, Header, parse_header, write_file
from stellarbyte.lora.bank import is_finite
from stellarbyte.lora.config import LoRAConfig
from stellarbyte.lora.layers import (
    Model,
    Weights,
    activate_lora,
    adapter_names,
    add_adapter,
    features,
    linear_layers,
    lora_layers,
    outer_modules,
    refuse_unknown,
)
from stellarbyte.lora.peft_config import AdapterError, config_json, parse_config
from stellarbyte.lora.untouched_memory import large_array

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1_000_000
MAX_HEADER_BYTES = 10_000_000
MAX_OWN_RANK = 1 << 16  # for `load_adapter`, where the caller chose the files
CHUNK_BYTES = 1 << 24
PREFIX = "base_model.model."
EXPERT_MODULE = re.compile(r"\.(experts|shared_expert|shared_expert_gate|mlp\.gate|block_sparse_moe)(\.|$)")
TENSOR_NAME = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(A|B)(?:\.default)?\.weight")  # some tools keep the name


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """The contents of an adapter's files.

    Attributes:
        weights: module name, as in the model → A [r, in] and B [out, r] in the stored dtype, all finite.
        content_hash: SHA-256 (hex) of the weights' file and the fields that the scales depend on.
        unmatched_targets: entries of a target_modules list without a tensor in the file.
    """

    config: LoRAConfig
    weights: Mapping[str, Weights]
    content_hash: str
    unmatched_targets: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.weights.values())

    def scale_of(self, module: str) -> float:
        """The factor of B A x in this module."""
        return self.config.scale_of(module)


def read_adapter(
    config_file: Path,
    weights_file: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    max_rank: int,
    opener: Callable[[str, int], int] = os.open,
) -> Adapter:
    """Read and check an adapter from untrusted files.

    Needs little more memory than the weights, and holds the GIL only briefly at a time.

    Args:
        shapes: (out, in) of every adaptable module, by its dotted name in the model.
        max_rank: largest accepted r, in the config and in the tensors' shapes.
        opener: opens both files, as the argument of `open`; no other file is read.

    Raises:
        AdapterError: a file cannot be read, is not an adapter, does not fit the model, or needs more than plain LoRA.
    """
    if weights_file.suffix != ".safetensors":
        raise AdapterError(
            f"{weights_file.name} is a pickle, which can run code when it is read; convert it to {WEIGHTS_FILE} first"
            " (PEFT: load the adapter where you trust it, then save_pretrained)."
        )
    with _opened(config_file, opener) as stream:
        raw = stream.read(MAX_CONFIG_BYTES + 1)
        if len(raw) > MAX_CONFIG_BYTES:
            raise AdapterError(f"it has more than {MAX_CONFIG_BYTES} bytes")
        config = parse_config(raw, max_rank=max_rank, max_keys=max(256, len(shapes)))
    with _opened(weights_file, opener) as stream:
        header = parse_header(stream, Path(weights_file.name), max_bytes=MAX_HEADER_BYTES)
        modules = _pair_tensors(header)
        _check_modules(header, modules, config, shapes, max_rank)
        digest = hashlib.sha256(_scale_fields(config) + header.raw)
        payload = _read_payload(stream, header.payload_bytes, digest)
        tensors = _tensors(payload, header)
    endings = {ending for module in modules for ending in _endings(module)}
    listed = () if isinstance(config.target_modules, str) else config.target_modules
    return Adapter(
        config=config,
        weights={module: (tensors[names["A"]], tensors[names["B"]]) for module, names in modules.items()},
        content_hash=digest.hexdigest(),
        unmatched_targets=tuple(name for name in listed if name not in endings),
    )


@contextmanager
def _opened(file: Path, opener: Callable[[str, int], int]) -> Iterator[BufferedReader]:
    """Open a regular file; errors become an AdapterError that begins with its name."""
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        with open(file, "rb", opener=lambda path, flags: opener(path, flags | os.O_NONBLOCK)) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise AdapterError("it is not a regular file")
            yield stream
    except OSError as error:
        raise AdapterError(f"{file.name} cannot be read: {error.strerror}.") from error
    except CheckpointError as error:  # already a sentence with the name
        raise AdapterError(str(error)) from error
    except AdapterError as error:
        raise AdapterError(f"{file.name} cannot be used: {error}.") from error.__cause__


def _pair_tensors(header: Header) -> dict[str, dict[str, str]]:
    """The names of every module's tensors: {"A": …, "B": …}, always both."""
    modules: dict[str, dict[str, str]] = {}
    for name in header.tensors:
        match = TENSOR_NAME.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"its tensor {name!r:.200} must be named {PREFIX}<module>.lora_A.weight or .lora_B.weight"
            )
        names = modules.setdefault(match[1], {})
        if match[2] in names:
            raise AdapterError(f"it holds lora_{match[2]} of {match[1]!r:.200} twice, with .default and without")
        names[match[2]] = name
    if not modules:
        raise AdapterError("it contains no tensors")
    for module, names in modules.items():
        if len(names) == 1:
            (there,), (absent,) = names, {"A", "B"} - names.keys()
            raise AdapterError(f"it contains lora_{there} of {module!r:.200} but no lora_{absent}")
    return modules


def _check_modules(
    header: Header,
    modules: Mapping[str, Mapping[str, str]],
    config: LoRAConfig,
    shapes: Mapping[str, tuple[int, int]],
    max_rank: int,
) -> None:
    """Refuse modules and shapes that do not fit the model, ranks that differ from the config, and unsupported
    dtypes."""
    if strange := [module for module in modules if module not in shapes]:
        some = ", ".join(f"{module!r:.200}" for module in strange[:3])
        others = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        if any(EXPERT_MODULE.search(module) for module in strange):
            raise AdapterError(f"adapters of experts and their routers are not supported, but it adapts {some}{others}")
        raise AdapterError(f"the model has no module {some}{others} that can be adapted")
    for module, names in modules.items():
        out, width = shapes[module]
        (a, _), (b, _) = header.tensors[names["A"]], header.tensors[names["B"]]
        for letter, info in (("A", a), ("B", b)):
            if info.dtype not in DTYPES:
                raise AdapterError(f"lora_{letter} of {module} is of type {info.dtype}, not one of {', '.join(DTYPES)}")
        rank = a.shape[0] if len(a.shape) == 2 else 0
        if rank < 1 or a.shape != (rank, width) or b.shape != (out, rank):
            raise AdapterError(
                f"lora_A and lora_B of {module} have the shapes {list(a.shape)} and {list(b.shape)}, "
                f"but must have [r, {width}] and [{out}, r]"
            )
        if rank > max_rank:
            raise AdapterError(f"lora_A of {module} has rank {rank}, but at most {max_rank} is supported")
        if rank != config.rank_of(module):
            raise AdapterError(f"lora_A of {module} has rank {rank}, but the config says {config.rank_of(module)}")


def _scale_fields(config: LoRAConfig) -> bytes:
    """The fields that the scales depend on, in a canonical form that keeps the order of a pattern's entries."""
    patterns = [[[key, float(value)] for key, value in p.items()] for p in (config.rank_pattern, config.alpha_pattern)]
    return json.dumps([config.r, float(config.lora_alpha), config.use_rslora, *patterns]).encode()


def _read_payload(stream: BufferedReader, num_bytes: int, digest: "hashlib._Hash") -> torch.Tensor:
    """Read the rest of a file [num_bytes], not mapped: truncation during the read is an error, not a SIGBUS."""
    payload = large_array(num_bytes, torch.uint8)
    view = payload.numpy().data
    done = 0
    while done < num_bytes:
        count = stream.readinto(view[done : done + CHUNK_BYTES])
        if not count:
            raise AdapterError("it was truncated while being read")
        digest.update(view[done : done + count])
        done += count
    return payload


def _tensors(payload: torch.Tensor, header: Header) -> dict[str, torch.Tensor]:
    """Views of a payload, which its tensors fill without gaps. Refuses NaN and infinity.

    Splits hundreds of tensors in few calls: each call releases the GIL and has to wait for it.
    """
    tensors: dict[str, torch.Tensor] = {}
    in_order = sorted(header.tensors.items(), key=lambda item: item[1][1])
    for dtype_name, group in groupby(in_order, lambda item: item[1][0].dtype):
        run, dtype = list(group), DTYPES[dtype_name]
        (_, (_, start)), (_, (last, last_start)) = run[0], run[-1]
        piece = payload[start : last_start + last.num_bytes]
        if start % dtype.itemsize:
            piece = piece.clone()  # aligned
        numbers = piece.view(dtype)
        parts = numbers.split([info.num_elements for _, (info, _) in run])
        views = {name: part.view(info.shape) for (name, (info, _)), part in zip(run, parts, strict=True)}
        if not is_finite(numbers):
            name = next(name for name, view in views.items() if not is_finite(view))
            raise AdapterError(f"{name} contains NaN or infinity")
        tensors |= views
    return tensors


def _endings(module: str) -> Iterator[str]:
    """The names that select this module in a target_modules list."""
    parts = module.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def load_adapter(model: Model, folder: str | os.PathLike[str], name: str = "default") -> Model:
    """Add the adapter in `folder`, in PEFT's layout, and make it the active one; returns `model`.

    Its weights are not trainable, the base model's do not change, and the model is put into evaluation mode. Merged
    adapters are unmerged first, and deactivated LoRA is activated.

    Raises:
        AdapterError: as `read_adapter`.
        ValueError: the model has an adapter of that name, or torch rejects the name.
    """
    if name in adapter_names(model):
        raise ValueError(f"the model already has an adapter {name!r}; remove it first or give another name")
    shapes = {module: features(layer)[::-1] for module, layer in linear_layers(model).items()}
    adapter = read_adapter(Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE, shapes, max_rank=MAX_OWN_RANK)
    config = adapter.config
    if isinstance(config.target_modules, str):  # an untrusted regular expression: never run
        config = dataclasses.replace(config, target_modules=tuple(adapter.weights))
    add_adapter(model, name, config, adapter.weights)
    activate_lora(model, name)
    model.eval()
    return model


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> None:
    """Write one adapter of `model` into `folder` in PEFT's layout, for PEFT and `load_adapter`.

    Existing files are replaced atomically.

    Raises:
        ValueError: the model has no adapter of that name, or its layers have it from different configs.
        OSError: the folder cannot be written.
    """
    refuse_unknown(model, name)
    layers = {module: layer for module, layer in sorted(lora_layers(model).items()) if name in layer.configs}
    tensors = {
        f"{PREFIX}{module}.lora_{letter}.weight": weight.detach().cpu()
        for module, layer in layers.items()
        for letter, weight in zip("AB", layer.matrices(name), strict=True)
    }
    text = config_json(_config_of(model, {module: layer.configs[name] for module, layer in layers.items()}))
    folder, suffix = Path(folder), f".partial-{secrets.token_hex(4)}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        layout = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        write_file(folder / (WEIGHTS_FILE + suffix), layout, tensors.values())
        (folder / (CONFIG_FILE + suffix)).write_text(text, encoding="utf-8")
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(folder / (file + suffix), folder / file)
    finally:
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            (folder / (file + suffix)).unlink(missing_ok=True)


def _config_of(model: nn.Module, configs: Mapping[str, LoRAConfig]) -> LoRAConfig:
    """One config for an adapter's layers; target_modules lists them unless the given one selects exactly them."""
    modules = tuple(configs)
    first = configs[modules[0]]
    listed = dataclasses.replace(first, target_modules=modules)
    if any(dataclasses.replace(other, target_modules=modules) != listed for other in configs.values()):
        raise ValueError("the adapter's layers have it from different configs; give each config its own adapter name")
    if first.targets_all_linear:
        return listed  # as PEFT writes it
    meant = {module for module in outer_modules(model) if first.targets(module)}
    return first if meant == set(modules) else listed
