"""Adapter folders with one fault each, and what their refusal says."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SHAPES = {f"model.layers.{layer}.self_attn.{name}": (6, 4) for layer in range(2) for name in ("q_proj", "v_proj")}
Q = "base_model.model.model.layers.0.self_attn.q_proj"
Edit = Callable[[Path], object]


def write_adapter(folder: Path) -> None:
    """A good adapter of rank 2 on every module of SHAPES."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for module, (out, width) in SHAPES.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, width)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, 2)
    save_file(tensors, folder / "adapter_model.safetensors")


def config(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        content = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: value for name, value in content.items() if value != "absent"}))

    return edit


def config_text(text: bytes) -> Edit:
    return lambda folder: (folder / "adapter_config.json").write_bytes(text)


def tensors(changes: dict[str, torch.Tensor | None]) -> Edit:
    """Replace tensors, add new ones, and leave out those that are None."""

    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        content = {name: tensor.clone() for name, tensor in load_file(file).items()} | changes
        save_file({name: tensor for name, tensor in content.items() if tensor is not None}, file)

    return edit


def renamed(old: str, new: str) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({name.replace(old, new): tensor.clone() for name, tensor in load_file(file).items()}, file)

    return edit


def header(change: Callable[[str], str]) -> Edit:
    """Change the header's text and leave the tensors' bytes alone."""

    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        content = file.read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        raw = change(content[8:end].decode()).encode()
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + content[end:])

    return edit


def weights(change: Callable[[bytes], bytes]) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return edit


def removed(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


def replaced_by_folder(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return edit


def replaced_by_pipe(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return edit


def twice(text: str) -> str:
    """The first tensor's entry once more."""
    name, entry = next((name, entry) for name, entry in json.loads(text).items() if name != "__metadata__")
    return text.rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"


def with_value(value: float) -> torch.Tensor:
    return torch.tensor([[1.0, 2.0, value, 3.0], [0.0] * 4])


MANY = {f"layers{number}": 2 for number in range(300)}


REFUSED: dict[str, tuple[Edit, str]] = {
    "no config": (removed("adapter_config.json"), "adapter_config.json cannot be read: No such file"),
    "no weights": (removed("adapter_model.safetensors"), "adapter_model.safetensors cannot be read: No such file"),
    "config is a folder": (replaced_by_folder("adapter_config.json"), "adapter_config.json cannot be read: Is a dir"),
    "config is a pipe": (replaced_by_pipe("adapter_config.json"), "adapter_config.json .* not a regular file"),
    "weights are a pipe": (replaced_by_pipe("adapter_model.safetensors"), "adapter_model.* not a regular file"),
    "a tensor twice": (
        tensors({f"{Q}.lora_A.default.weight": torch.ones(2, 8)}),
        "holds lora_A of 'model.layers.0.self_attn.q_proj' twice",
    ),
    "no JSON": (config_text(b"{'r': 8}"), "not valid JSON"),
    "no text": (config_text(b"\xff\xfe\x80" * 9), "not valid JSON"),
    "a list": (config_text(b"[]"), "must contain a JSON object"),
    "deep JSON": (config_text(b"[" * 500_000), "not valid JSON"),
    "deep field": (config_text(b'{"r": ' + b'{"a":' * 100_000), "not valid JSON"),
    "endless number": (config_text(b'{"r": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "large config": (config_text(b" " * 1_000_001), "more than 1000000 bytes"),
    "another method": (config(peft_type="IA3"), "peft_type is 'IA3'"),
    "no method": (config(peft_type="absent"), "peft_type is None"),
    "dora": (config(use_dora=True), r"contains no lora_magnitude_vector"),
    "modules to save": (config(modules_to_save=["lm_head"]), "which modules_to_save needs"),
    "bias": (config(bias="lora_only"), r"bias \('lora_only'\) must be 'none'"),
    "lora bias": (config(lora_bias=True), "'lora_bias' is True"),
    "replication": (config(layer_replication=[[0, 2], [1, 2]]), "'layer_replication'"),
    "trained tokens": (config(trainable_token_indices=[5]), "'trainable_token_indices'"),
    "alora": (config(alora_invocation_tokens=[1, "2"]), "alora_invocation_tokens .* must be a list of 1 to 256 token"),
    "alora with dora": (
        config(alora_invocation_tokens=[1, 2], use_dora=True),
        "alora_invocation_tokens cannot be combined with use_dora",
    ),
    "qalora": (config(use_qalora=True), "'use_qalora'"),
    "parameters": (config(target_parameters=["experts.up"]), "'target_parameters'"),
    "megatron": (config(megatron_config={"a": 1}), "'megatron_config'"),
    "arrow": (config(arrow_config={"top_k": 3}), "'arrow_config'"),
    "kasa": (config(kasa_config={"beta": 1}), "'kasa_config'"),
    "bdlora": (config(use_bdlora={"nblocks": 2}), "'use_bdlora'"),
    "monteclora": (config(monteclora_config={"a": 1}), "'monteclora_config'"),
    "unknown option": (config(use_next_years_idea=0.5), "'use_next_years_idea' is 0.5"),
    "lone surrogate": (config(**{"\ud800": "\ud800"}), r"'\\ud800' is '\\ud800'"),
    "pissa": (
        config(init_lora_weights="pissa_niter_4"),
        "init_lora_weights is 'pissa_niter_4', which also changes the base",
    ),
    "rank of wrong type": (config(r="2"), r"r \('2'\) must be a whole number"),
    "broken rank": (config(r=2.0), r"r \(2.0\) must be a whole number"),
    "no rank at all": (config(r=None), r"r \(None\) must be a whole number"),
    "rank zero": (config(r=0), r"r \(0\) must be at least 1"),
    "large rank": (config(r=9), "r is 9, but at most 8"),
    "large rank by pattern": (config(rank_pattern={"x": 10**40}), r"rank_pattern\['x'\] is 10+, but at most 8"),
    "alpha of wrong type": (config(lora_alpha=[4]), r"lora_alpha \(\[4\]\) must be a finite number"),
    "alpha NaN": (config(lora_alpha=float("nan")), r"lora_alpha \(nan\) must be a finite number"),
    "dropout": (config(lora_dropout="none"), r"lora_dropout \('none'\) must be a finite number"),
    "rslora of wrong type": (config(use_rslora="yes"), r"use_rslora \('yes'\) must be True or False"),
    "no targets": (config(target_modules="absent"), r"target_modules \(None\) must be a list"),
    "targets of wrong type": (config(target_modules=[{"a": 1}]), "target_modules .* must be a list"),
    "bad expression": (config(target_modules="(("), r"target_modules \('\(\('\) is not a valid regular expression"),
    "endless expression": (config(target_modules="(a" * 9_000), "at most 500 characters"),
    "nested expression": (config(target_modules="(" * 250 + ")" * 249), "target_modules .* is not a valid regular"),
    "pattern of wrong type": (config(rank_pattern=[1]), r"rank_pattern \(\[1\]\) must map"),
    "rank in pattern": (config(rank_pattern={"q_proj": "2"}), r"rank_pattern\['q_proj'\] \('2'\) must be a whole"),
    "alpha in pattern": (
        config(alpha_pattern={"q_proj": None}),
        r"alpha_pattern\['q_proj'\] \(None\) must be a finite",
    ),
    "slow pattern": (config(alpha_pattern={"(.*.*)*x": 2}), r"alpha_pattern has the key '\(\.\*\.\*\)\*x'"),
    "slow alternatives": (config(rank_pattern={"(.|.)" * 30 + "!": 2}), "rank_pattern has the key"),
    "many alternatives": (config(rank_pattern={"(.|.)" * 30: 2}), "expressions of rank_pattern have more wildcards or"),
    "wildcards": (config(alpha_pattern={".*.*.*x": 2}), "expressions of alpha_pattern have more wildcards or"),
    "both": (config(rank_pattern={".*.*" + f"({'|'.join('.' * 40)})" * 2 + "x": 2}), "of rank_pattern have more wildc"),
    "many patterns": (config(rank_pattern=MANY), "rank_pattern has 300 entries, but at most 256"),
    "rank by shape": (config(r=3), "model.layers.0.self_attn.q_proj has rank 2, but the config says 3"),
    "rank by pattern": (
        config(rank_pattern={"1.self_attn.v_proj": 1}),
        "layers.1.self_attn.v_proj has rank 2, but .* 1",
    ),
    "cut": (weights(lambda content: content[:-1]), "adapter_model.safetensors has .* bytes, but its header describes"),
    "longer": (weights(lambda content: content + b"\0"), "bytes, but its header describes"),
    "empty": (weights(lambda _: b""), "is not a safetensors file"),
    "pickle": (weights(lambda _: b"\x80\x04cos\nsystem\n."), "is not a safetensors file"),
    "zeros": (weights(lambda _: b"\0" * 4096), "is not a safetensors file"),
    "header beyond the end": (weights(lambda _: b"\xff" * 64), "is not a safetensors file"),
    "large header": (header(lambda text: text + " " * 10_000_001), "is not a safetensors file"),
    "header no JSON": (header(lambda text: text[:-9]), "corrupt safetensors header"),
    "header a list": (header(lambda _: "[]"), "corrupt safetensors header"),
    "deep header": (header(lambda _: "[" * 100_000), "corrupt safetensors header"),
    "a name twice": (header(twice), "corrupt safetensors header"),
    "overlap": (header(lambda text: text.replace("[32,80]", "[0,48]")), "corrupt safetensors header: the bytes of '"),
    "negative offset": (header(lambda text: text.replace("[0,32]", "[-32,0]")), "corrupt safetensors header"),
    "many dimensions": (header(lambda text: text.replace("[2,4]", str([9] * 500_000))), "corrupt safetensors header"),
    "huge dimension": (header(lambda text: text.replace("[2,4]", f"[{10**60},4]")), "corrupt safetensors header"),
    "unknown dtype": (header(lambda text: text.replace('"F32"', '"F4"')), "corrupt safetensors header"),
    "no tensors": (
        tensors(dict.fromkeys(f"base_model.model.{m}.lora_{x}.weight" for m in SHAPES for x in "AB")),
        "no ten",
    ),
    "A alone": (
        tensors({f"{Q}.lora_B.weight": None}),
        "contains lora_A of 'model.layers.0.self_attn.q_proj' but no lora_B",
    ),
    "B alone": (
        tensors({f"{Q}.lora_A.weight": None}),
        "contains lora_B of 'model.layers.0.self_attn.q_proj' but no lora_A",
    ),
    "embedding": (tensors({"base_model.model.embed_tokens.lora_embedding_A": torch.ones(2, 4)}), "lora_embedding_A"),
    "magnitude": (tensors({f"{Q}.lora_magnitude_vector": torch.ones(6)}), f"{Q}.lora_magnitude_vector"),
    "bias weights": (tensors({f"{Q}.lora_B.bias": torch.ones(6)}), f"{Q}.lora_B.bias"),
    "saved module": (tensors({"base_model.model.lm_head.weight": torch.ones(6, 4)}), "base_model.model.lm_head.weight"),
    "names with another adapter": (renamed("lora_A.weight", "lora_A.mine.weight"), "lora_A.mine.weight"),
    "other prefix": (renamed("base_model.model.", "transformer."), "'transformer.model.layers"),
    "control characters": (renamed("q_proj.lora_A", "\nq_proj\x1b.lora_X"), r"\\nq_proj\\x1b.lora_X"),
    "unknown module": (
        renamed("0.self_attn.q_proj", "7.self_attn.q_proj"),
        "no module 'model.layers.7.self_attn.q_proj' ",
    ),
    "experts": (
        renamed("layers.0.self_attn.q_proj", "layers.0.mlp.experts.3.up_proj"),
        "adapters of experts and their routers are not supported, but it adapts 'model.layers.0.mlp.experts.3.up_proj'",
    ),
    "stacks of experts": (renamed("layers.0.self_attn.q_proj", "layers.0.mlp.experts"), "adapters of experts and"),
    "shared expert": (
        renamed("layers.0.self_attn.q_proj", "layers.0.mlp.shared_expert.up_proj"),
        "adapters of experts and",
    ),
    "router": (renamed("layers.0.self_attn.q_proj", "layers.0.mlp.gate"), "adapters of experts and their routers"),
    "router of gpt-oss": (
        renamed("layers.0.self_attn.q_proj", "layers.0.mlp.router"),
        "adapters of experts and their routers",
    ),
    "parameters of experts": (
        config(target_parameters=["mlp.experts.gate_up_proj"]),
        r"'target_parameters' is \['mlp.experts.gate_up_proj'\], but only plain LoRA",
    ),
    "unknown modules": (renamed("self_attn", "attention"), "no module 'model.layers.*' and 1 more that can be adapted"),
    "width": (
        tensors({f"{Q}.lora_A.weight": torch.ones(2, 5)}),
        r"0.self_attn.q_proj have the shapes \[2, 5\] and \[6, 2\]",
    ),
    "out": (tensors({f"{Q}.lora_B.weight": torch.ones(4, 2)}), r"\[4, 2\], but must have \[r, 4\] and \[6, r\]"),
    "ranks differ": (tensors({f"{Q}.lora_B.weight": torch.ones(6, 3)}), r"\[2, 4\] and \[6, 3\]"),
    "one dimension": (tensors({f"{Q}.lora_A.weight": torch.ones(8)}), r"the shapes \[8\]"),
    "three dimensions": (tensors({f"{Q}.lora_A.weight": torch.ones(2, 4, 1)}), r"the shapes \[2, 4, 1\]"),
    "empty tensors": (
        tensors({f"{Q}.lora_A.weight": torch.ones(0, 4), f"{Q}.lora_B.weight": torch.ones(6, 0)}),
        r"the shapes \[0, 4\] and \[6, 0\]",
    ),
    "large rank by shape": (
        tensors({f"{Q}.lora_A.weight": torch.ones(9, 4), f"{Q}.lora_B.weight": torch.ones(6, 9)}),
        "q_proj has rank 9, but at most 8",
    ),
    "integers": (tensors({f"{Q}.lora_A.weight": torch.ones(2, 4, dtype=torch.int32)}), "q_proj is of type I32"),
    "booleans": (tensors({f"{Q}.lora_A.weight": torch.ones(2, 4, dtype=torch.bool)}), "q_proj is of type BOOL"),
    "8 bits": (tensors({f"{Q}.lora_B.weight": torch.ones(6, 2).to(torch.float8_e4m3fn)}), "q_proj is of type F8_E4M3"),
    "NaN": (tensors({f"{Q}.lora_A.weight": with_value(float("nan"))}), f"{Q}.lora_A.weight contains NaN"),
    "infinity": (tensors({f"{Q}.lora_A.weight": with_value(float("inf"))}), f"{Q}.lora_A.weight contains NaN"),
    "half infinity": (tensors({f"{Q}.lora_A.weight": with_value(1e9).half()}), f"{Q}.lora_A.weight contains NaN"),
    "wide NaN": (
        tensors({f"{Q}.lora_A.weight": with_value(float("nan")).double()}),
        f"{Q}.lora_A.weight contains NaN",
    ),
}
