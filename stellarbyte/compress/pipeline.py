"""Writes a smaller model: pruned, quantized with calibration, and a report of its quality on held-out text."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from stellarbyte.checkpoint.convert import write_checkpoint
from stellarbyte.checkpoint.native import load_language_model, load_model, open_checkpoint, read_generation
from stellarbyte.checkpoint.plan import ConversionPlan, PlannedTensor
from stellarbyte.checkpoint.quantized.origin import Origin
from stellarbyte.checkpoint.staging import refuse_existing
from stellarbyte.compress.errors import CompressError
from stellarbyte.compress.pruning import Pruning, pruned_model
from stellarbyte.compress.quality import Quality, compare
from stellarbyte.compress.quantization import compressed_tensors
from stellarbyte.compress.quantization.quantize import QuantizedModel, layout
from stellarbyte.compress.quantization.rounding import MatrixReport
from stellarbyte.compress.quantization.settings import Quantization
from stellarbyte.compress.stream import AnyModel, last_states
from stellarbyte.compress.texts import Texts
from stellarbyte.config import ByteModelConfig

Format = Literal["stellarbyte", "compressed-tensors"]
Step = Callable[[str, int, int], None]  # what is done, layers done, layers in all

REPORT_FILE = "report.json"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
    "additional_chat_templates",
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Attributes: num_bytes: of the tensors, before and after; notes: sentences about what was left out."""

    model: str
    method: str
    kind: str
    head: str
    pruning: str | None
    text: str
    calibration_tokens: int
    contexts_left_out: int
    quality: Quality
    num_bytes: tuple[int, int]
    matrices: tuple[MatrixReport, ...]
    notes: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        content = dataclasses.asdict(self)
        content["quality"]["change"] = self.quality.change
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")


def compress(
    source: Path,
    target: Path,
    texts: Texts,
    *,
    quantization: Quantization | None,
    pruning: Pruning | None = None,
    form: Format = "stellarbyte",
    step: Step = lambda _what, _done, _total: None,
) -> Report:
    """Write the checkpoint `source` into the new folder `target`, smaller, completely or not at all.

    One layer at a time is in float32, with the calibration's inputs of one layer; pruning has the whole model in memory
    before.

    Args:
        quantization: None: pruned only.
        form: "compressed-tensors": a folder for transformers and vLLM.
        step: called after each layer.

    Raises:
        CompressError: what is asked for does not fit the model, or a Hessian is singular; the message names it.
        CheckpointError: a folder cannot be read or written.
    """
    if quantization is None and pruning is None:
        raise CompressError("There is nothing to do: give a method, or what to prune.")
    refuse_existing(target)
    checkpoint = open_checkpoint(source)
    longest = max(texts.calibration_BT.shape[1], texts.held_out_BT.shape[1])
    if longest > checkpoint.config.max_position_embeddings:
        raise CompressError(
            f"Contexts of {longest} tokens are longer than the model's "
            f"{checkpoint.config.max_position_embeddings} (max_position_embeddings)."
        )
    num_layers = checkpoint.config.num_hidden_layers
    stored_dtype = torch.float32 if checkpoint.quantized else None
    if form == "compressed-tensors":
        if quantization is None:
            raise CompressError("The format compressed-tensors needs a method: it is for quantized models.")
        dtype = compressed_tensors.dtype_of(checkpoint.config, checkpoint.tensors)
        if quantization.zero_points == "real":
            raise CompressError("compressed-tensors folders have no real zero points; leave them integer.")
        quantization = dataclasses.replace(quantization, head=False, scale_dtype=dtype, zero_points="symmetric")
    if pruning is not None and pruning.is_sparse and quantization is not None:
        quantization = dataclasses.replace(quantization, keeps_zeros=True)
    model: AnyModel = load_language_model(source, dtype=stored_dtype)
    config, head = checkpoint.config, model.lm_head.weight.data
    before = last_states(
        model, config, texts.held_out_BT, lambda number: step("the model itself", number + 1, num_layers)
    ), head  # fmt: skip
    if pruning is not None:
        model = pruned_model(load_model(source, dtype=stored_dtype), pruning, texts.calibration_BT)
        config = model.config
    config = copy.deepcopy(config)
    if quantization is not None and quantization.head:
        config.tie_word_embeddings = False
    stored = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    planned = layout(config, quantization, stored)
    calibrates = quantization is not None and quantization.method != "round"
    used = QuantizedModel(
        model,
        config,
        quantization,
        texts.calibration_BT if calibrates else texts.calibration_BT[:0],
        texts.held_out_BT,
        lambda number: step("smaller layers", number + 1, num_layers),
    )
    plan = _plan(source, config, planned, used, _origin(quantization, pruning), form, quantization)
    reports: list[Report] = []

    def finish(folder: Path) -> None:
        quality = compare(config, texts.held_out_BT, before, (used.held_out, used.head))
        head_kind = "as stored" if quantization is None or not quantization.head else quantization.head_kind
        report = Report(
            model=source.name,
            method="none" if quantization is None else quantization.method,
            kind="as stored" if quantization is None else quantization.kind,
            head=head_kind,
            pruning=None if pruning is None else str(pruning),
            text=texts.source,
            calibration_tokens=texts.calibration_BT.numel() if calibrates else 0,
            contexts_left_out=texts.num_left_out,
            quality=quality,
            num_bytes=(
                sum(info.num_bytes for info in checkpoint.tensors.values()),
                sum(tensor.num_bytes for tensor in plan.tensors.values()),
            ),
            matrices=tuple(used.result.reports),
            notes=tuple(used.result.notes),
        )
        report.write(folder)
        reports.append(report)

    write_checkpoint(plan, target, add_files=finish)
    return reports[0]


def _plan(
    source: Path,
    config: ByteModelConfig,
    planned: Mapping[str, torch.Tensor],
    used: QuantizedModel,
    origin: Origin | None,
    form: Format,
    quantization: Quantization | None,
) -> ConversionPlan:
    tensors = {
        name: PlannedTensor(dtype=empty.dtype, shape=tuple(empty.shape), read=partial(used.read, name))
        for name, empty in planned.items()
    }
    generation = read_generation(source)
    if form == "compressed-tensors":
        assert quantization is not None
        return ConversionPlan(
            source=source,
            config=compressed_tensors.folder_config(config, quantization),
            generation=generation,
            tensors=compressed_tensors.packed_tensors(tensors),
            write_tokenizer=partial(_copy_tokenizer, source),
        )
    config.architectures = ["ByteTransformer"]
    return ConversionPlan(
        source=source,
        config=config,
        generation=generation,
        tensors=tensors,
        write_tokenizer=partial(_copy_tokenizer, source),
        origin=origin,
    )


def _origin(quantization: Quantization | None, pruning: Pruning | None) -> Origin | None:
    if quantization is None:
        return None
    pruned = "" if pruning is None else f", pruned ({pruning})"
    return Origin(format=f"stellarbyte compress, {quantization.method}, {quantization.kind}{pruned}")


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in _TOKENIZER_FILES:
        file = source / name
        if file.is_dir():
            shutil.copytree(file, target / name)
        elif file.is_file():
            shutil.copyfile(file, target / name)
