"""Adapters in PEFT's files, read and checked.

Files are untrusted: nothing is unpickled, headers are checked before tensors are read, and no message contains a
folder.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

import torch

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.safetensors_file import DTYPES, Header, parse_header
from stellarbyte.lora.bank import is_finite
from stellarbyte.lora.config import LoRAConfig
from stellarbyte.lora.peft_config import AdapterError, parse_config
from stellarbyte.lora.untouched_memory import large_array

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1_000_000
MAX_HEADER_BYTES = 10_000_000
CHUNK_BYTES = 1 << 24
PREFIX = "base_model.model."
EXPERT_MODULE = re.compile(r"\.(experts|shared_expert|shared_expert_gate|mlp\.gate|mlp\.router|block_sparse_moe)(\.|$)")
MAGNITUDE_NAME = re.compile(re.escape(PREFIX) + r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
TENSOR_NAME = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(A|B)(?:\.default)?\.weight")  # some tools keep the name


Shape = tuple[int, ...]
NO_COPIES: Mapping[str, Shape] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """The contents of an adapter's files.

    Attributes:
        weights: module name, as in the model → A [r, in] and B [out, r] in the stored dtype, all finite. Of a
            convolution A is [r, in, height, width] and B [out, r, 1, 1].
        magnitudes: with DoRA, of the same modules, m [out].
        copies: parameters of modules_to_save by their full names, such as "lm_head.weight".
        content_hash: SHA-256 (hex) of the weights' file and the fields that the outputs depend on.
        unmatched_targets: entries of a target_modules list without a tensor in the file.
    """

    config: LoRAConfig
    weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    magnitudes: Mapping[str, torch.Tensor]
    copies: Mapping[str, torch.Tensor]
    content_hash: str
    unmatched_targets: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        matrices = sum(a.nbytes + b.nbytes for a, b in self.weights.values())
        return matrices + sum(tensor.nbytes for tensor in (*self.magnitudes.values(), *self.copies.values()))

    def scale_of(self, module: str) -> float:
        """The factor of B A x in this module."""
        return self.config.scale_of(module)


def read_adapter(
    config_file: Path,
    weights_file: Path,
    shapes: Mapping[str, Shape],
    *,
    max_rank: int,
    accepts: Set[str] = frozenset(),
    copies: Mapping[str, Shape] = NO_COPIES,
    opener: Callable[[str, int], int] = os.open,
) -> Adapter:
    """Read and check an adapter from untrusted files.

    Needs little more memory than the weights, and holds the GIL only briefly at a time.

    Args:
        shapes: (out, in) of every adaptable module, by its dotted name in the model; of convolutions (out, in, height,
            width).
        max_rank: largest accepted r, in the config and in the tensors' shapes.
        accepts: what may go beyond plain LoRA: fields of `peft_config.BEYOND_PLAIN`.
        copies: shapes of the parameters, by their full names, that modules_to_save may replace.
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
        config = parse_config(raw, max_rank=max_rank, max_keys=max(256, len(shapes)), accepts=accepts)
        copied = _copied(config, copies)
    with _opened(weights_file, opener) as stream:
        header = parse_header(stream, Path(weights_file.name), max_bytes=MAX_HEADER_BYTES)
        modules = _pair_tensors(name for name in header.tensors if not _is_other(name, config, copied))
        _check_modules(header, modules, config, shapes, max_rank)
        magnitudes = _magnitudes(header, modules, shapes) if config.use_dora else {}
        _check_copies(header, copied)
        digest = hashlib.sha256(_output_fields(config) + header.raw)
        payload = _read_payload(stream, header.payload_bytes, digest)
        tensors = _tensors(payload, header)
    endings = {ending for module in modules for ending in _endings(module)}
    listed = () if isinstance(config.target_modules, str) else config.target_modules
    return Adapter(
        config=config,
        weights={module: (tensors[names["A"]], tensors[names["B"]]) for module, names in modules.items()},
        magnitudes={module: tensors[name] for module, name in magnitudes.items()},
        copies={name: tensors[PREFIX + name] for name in copied},
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


def _copied(config: LoRAConfig, copies: Mapping[str, Shape]) -> dict[str, Shape]:
    """The parameters that `config.modules_to_save` replaces, of those that may be."""
    found: dict[str, Shape] = {}
    for entry in config.modules_to_save:
        of_entry = {name: shape for name, shape in copies.items() if _is_inside(name, entry)}
        if not of_entry:
            raise AdapterError(f"modules_to_save has {entry!r:.100}, which is no module that can be replaced")
        found |= of_entry
    return found


def _is_inside(parameter: str, entry: str) -> bool:
    """Whether a parameter belongs to a module that an entry of modules_to_save names."""
    parts = parameter.split(".")
    return any(".".join(parts[:end]).endswith(entry) for end in range(1, len(parts)))


def _is_other(name: str, config: LoRAConfig, copied: Mapping[str, Shape]) -> bool:
    """Whether a tensor is no low-rank matrix, but one that the config explains."""
    is_copy = name.startswith(PREFIX) and name.removeprefix(PREFIX) in copied
    return is_copy or (config.use_dora and MAGNITUDE_NAME.fullmatch(name) is not None)


def _magnitudes(header: Header, modules: Iterable[str], shapes: Mapping[str, Shape]) -> dict[str, str]:
    """The names of DoRA's vectors, one for each module."""
    found: dict[str, str] = {}
    for name, (info, _) in header.tensors.items():
        match = MAGNITUDE_NAME.fullmatch(name)
        if match is None:
            continue
        module = match[1]
        if module in found or module not in set(modules):
            raise AdapterError(f"its tensor {name!r:.200} must be the only magnitude of a module with lora_A")
        if info.dtype not in DTYPES or tuple(info.shape) != shapes[module][:1]:
            raise AdapterError(
                f"lora_magnitude_vector of {module} is {list(info.shape)} of type {info.dtype}, but must be"
                f" {list(shapes[module][:1])} of {', '.join(DTYPES)}"
            )
        found[module] = name
    if absent := [module for module in modules if module not in found]:
        raise AdapterError(f"use_dora is True, but it contains no lora_magnitude_vector of {absent[0]!r:.200}")
    return found


def _check_copies(header: Header, copied: Mapping[str, Shape]) -> None:
    """Refuse a file that lacks a parameter of modules_to_save, or has one that does not fit the model."""
    for name, shape in copied.items():
        if PREFIX + name not in header.tensors:
            raise AdapterError(f"it contains no {PREFIX}{name}, which modules_to_save needs")
        info, _ = header.tensors[PREFIX + name]
        if info.dtype not in DTYPES or tuple(info.shape) != shape:
            raise AdapterError(
                f"{PREFIX}{name} is {list(info.shape)} of type {info.dtype}, but must be {list(shape)} of"
                f" {', '.join(DTYPES)}"
            )


def _pair_tensors(tensor_names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The names of every module's tensors: {"A": …, "B": …}, always both."""
    modules: dict[str, dict[str, str]] = {}
    for name in tensor_names:
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
    shapes: Mapping[str, Shape],
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
        out, *inner = shapes[module]
        (a, _), (b, _) = header.tensors[names["A"]], header.tensors[names["B"]]
        for letter, info in (("A", a), ("B", b)):
            if info.dtype not in DTYPES:
                raise AdapterError(f"lora_{letter} of {module} is of type {info.dtype}, not one of {', '.join(DTYPES)}")
        rank, ones = (a.shape[0] if len(a.shape) == len(shapes[module]) else 0), [1] * (len(inner) - 1)
        if rank < 1 or list(a.shape) != [rank, *inner] or list(b.shape) != [out, rank, *ones]:
            wanted = f"[{', '.join(map(str, ['r', *inner]))}] and [{', '.join(map(str, [out, 'r', *ones]))}]"
            raise AdapterError(
                f"lora_A and lora_B of {module} have the shapes {list(a.shape)} and {list(b.shape)}, "
                f"but must have {wanted}"
            )
        if rank > max_rank:
            raise AdapterError(f"lora_A of {module} has rank {rank}, but at most {max_rank} is supported")
        if rank != config.rank_of(module):
            raise AdapterError(f"lora_A of {module} has rank {rank}, but the config says {config.rank_of(module)}")


def _output_fields(config: LoRAConfig) -> bytes:
    """The fields that the outputs depend on, in a canonical form that keeps the order of a pattern's entries."""
    patterns = [[[key, float(value)] for key, value in p.items()] for p in (config.rank_pattern, config.alpha_pattern)]
    invocation = [] if config.alora_invocation_tokens is None else [config.alora_invocation_tokens]
    return json.dumps([config.r, float(config.lora_alpha), config.use_rslora, *patterns, *invocation]).encode()


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
