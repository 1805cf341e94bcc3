"""GGUF files: every tensor type gives the numbers that ggml defines, and a damaged file gives one sentence."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from stellarbyte.checkpoint.convert import convert, make_plan
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.gguf.file import open_gguf
from tests.support.models.gguf_files import write_gguf
from tests.support.models.hugging_face import tiny_llama

Kind = GGMLQuantizationType


def write_tensor(path: Path, raw: np.ndarray, kind: Kind) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_floats_are_read_bit_by_bit(kind: Kind, tmp_path: Path):
    dtype = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}[kind]
    values = torch.randn(3, 64).to(dtype)
    raw = values.view(torch.uint8).numpy() if kind == Kind.BF16 else values.numpy()
    file = open_gguf(write_tensor(tmp_path / "x.gguf", raw, kind))
    assert file.read("x").dtype == dtype
    assert torch.equal(file.read("x"), values)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
def test_simple_blocks_are_near_what_was_quantised(kind: Kind, tmp_path: Path):
    values = np.random.default_rng(0).uniform(-1, 1, (4, 96)).astype(np.float32)
    file = open_gguf(write_tensor(tmp_path / "x.gguf", quantize(values, kind), kind))
    largest_step = {Kind.Q8_0: 1 / 127, Kind.Q4_0: 2 / 15, Kind.Q4_1: 2 / 15}.get(kind, 2 / 31)
    assert file.read("x").shape == (4, 96)
    assert np.abs(file.read("x").numpy() - values).max() <= largest_step


def half(raw: np.ndarray) -> float:
    return float(raw.view(np.float16)[0])


def scale_and_min(scales: np.ndarray, j: int) -> tuple[int, int]:
    """get_scale_min_k4 of ggml-quants.c."""
    q = [int(value) for value in scales]
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | (q[j - 4] >> 6 << 4), (q[j + 4] >> 4) | (q[j] >> 6 << 4)


def q4_k(block: np.ndarray) -> list[float]:
    """dequantize_row_q4_K of ggml-quants.c, element by element."""
    d, minimum, scales, qs = half(block[:2]), half(block[2:4]), block[4:16], block[16:]
    y = []
    for part in range(8):
        scale, offset = scale_and_min(scales, part)
        for value in qs[part // 2 * 32 : part // 2 * 32 + 32]:
            y.append(d * scale * (int(value) >> 4 * (part % 2) & 15) - minimum * offset)
    return y


def q5_k(block: np.ndarray) -> list[float]:
    """dequantize_row_q5_K."""
    d, minimum, scales, high, qs = half(block[:2]), half(block[2:4]), block[4:16], block[16:48], block[48:]
    y = []
    for part in range(8):
        scale, offset = scale_and_min(scales, part)
        for low, top in zip(qs[part // 2 * 32 : part // 2 * 32 + 32], high, strict=True):
            value = (int(low) >> 4 * (part % 2) & 15) + 16 * (int(top) >> part & 1)
            y.append(d * scale * value - minimum * offset)
    return y


def q6_k(block: np.ndarray) -> list[float]:
    """dequantize_row_q6_K."""
    low, high, scales, d = block[:128], block[128:192], block[192:208].view(np.int8), half(block[208:])
    y = np.zeros(256)
    for n in range(2):
        for l in range(32):  # noqa: E741 (ggml's name)
            for part in range(4):
                nibble = int(low[64 * n + 32 * (part % 2) + l]) >> 4 * (part // 2) & 15
                value = (nibble | (int(high[32 * n + l]) >> 2 * part & 3) << 4) - 32
                y[128 * n + 32 * part + l] = d * int(scales[8 * n + 2 * part + l // 16]) * value
    return list(y)


def q2_k(block: np.ndarray) -> list[float]:
    """dequantize_row_q2_K."""
    scales, qs, d, minimum = block[:16], block[16:80], half(block[80:82]), half(block[82:])
    y = []
    for part in range(16):  # of 16 numbers: 8 of them share 32 bytes
        start = part // 8 * 32 + part % 2 * 16
        for value in qs[start : start + 16]:
            q = int(value) >> 2 * (part % 8 // 2) & 3
            y.append(d * (int(scales[part]) & 15) * q - minimum * (int(scales[part]) >> 4))
    return y


def q3_k(block: np.ndarray) -> list[float]:
    """dequantize_row_q3_K."""
    mask, qs, packed, d = block[:32], block[32:96], [int(value) for value in block[96:108]], half(block[108:])
    y = []
    for part in range(16):
        low = packed[part % 8] >> 4 * (part // 8) & 15
        scale = (low | (packed[8 + part % 4] >> 2 * (part // 4) & 3) << 4) - 32
        for i in range(16):
            at = part % 2 * 16 + i
            q = int(qs[part // 8 * 32 + at]) >> 2 * (part % 8 // 2) & 3
            y.append(d * scale * (q - (0 if int(mask[at]) >> part // 2 & 1 else 4)))
    return y


KVALUES_IQ4NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def iq4_nl(block: np.ndarray, scale: int = 1) -> list[float]:
    """dequantize_row_iq4_nl; `scale` is of one part of a block of IQ4_XS."""
    d, qs = half(block[:2]) * scale, [int(value) for value in block[2:]]
    return [d * KVALUES_IQ4NL[q] for q in [*(value & 15 for value in qs), *(value >> 4 for value in qs)]]


def iq4_xs(block: np.ndarray) -> list[float]:
    """dequantize_row_iq4_xs."""
    high, low, y = int(block[2:4].view(np.uint16)[0]), block[4:8], []
    for part in range(8):
        scale = (int(low[part // 2]) >> 4 * (part % 2) & 15 | (high >> 2 * part & 3) << 4) - 32
        y += iq4_nl(np.concatenate([block[:2], block[8 + 16 * part : 24 + 16 * part]]), scale)
    return y


FORMULAS = {  # and where the halves of a block are
    Kind.Q2_K: (q2_k, [80, 82]),
    Kind.Q3_K: (q3_k, [108]),
    Kind.Q4_K: (q4_k, [0, 2]),
    Kind.Q5_K: (q5_k, [0, 2]),
    Kind.Q6_K: (q6_k, [208]),
    Kind.IQ4_NL: (iq4_nl, [0]),
    Kind.IQ4_XS: (iq4_xs, [0]),
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_k_blocks_follow_ggml(kind: Kind, tmp_path: Path):
    rng = np.random.default_rng(0)
    formula, halves = FORMULAS[kind]
    blocks = rng.integers(0, 256, (6, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for at in halves:  # random bytes could be NaN
        blocks[:, at : at + 2] = rng.uniform(-0.1, 0.1, (6, 1)).astype(np.float16).view(np.uint8)
    file = open_gguf(write_tensor(tmp_path / "x.gguf", blocks.reshape(3, -1), kind))
    expected = np.array([formula(block) for block in blocks]).reshape(3, -1)
    np.testing.assert_allclose(file.read("x").numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_blocks_of_tables_are_those_of_the_package(name: str, tmp_path: Path):
    """Each block of a matrix by itself; their tables of thousands of numbers are the package's."""
    kind = Kind[name]
    blocks = np.random.default_rng(0).integers(0, 60, (6, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    file = open_gguf(write_tensor(tmp_path / "x.gguf", blocks.reshape(3, -1), kind))
    expected = np.stack([dequantize(block[None], kind)[0] for block in blocks]).reshape(3, 512)
    assert np.isfinite(expected).all() and expected.std() > 0
    np.testing.assert_array_equal(file.read("x").numpy(), expected)


def test_unsupported_type_is_named(tmp_path: Path):
    raw = np.zeros((2, GGML_QUANT_SIZES[Kind.TQ1_0][1]), dtype=np.uint8)
    with pytest.raises(CheckpointError, match=r"holds x as TQ1_0; supported are F32, F16, BF16, Q8_0"):
        open_gguf(write_tensor(tmp_path / "x.gguf", raw, Kind.TQ1_0))


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("tiny")
    return write_gguf(folder / "x.gguf", tiny_llama(folder / "source")).read_bytes()


def refusal(content: bytes, folder: Path) -> str:
    """The message with which a file of this content is refused; whatever else is raised fails the test."""
    file = folder / "damaged.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        convert(file, folder / "target")
    assert [entry.name for entry in folder.iterdir()] == ["damaged.gguf"]
    return str(caught.value)


def test_truncation_anywhere_is_one_sentence(tiny_gguf: bytes, tmp_path: Path):
    points = [*range(64), *range(64, len(tiny_gguf), len(tiny_gguf) // 150), len(tiny_gguf) - 1]
    for point in points:
        message = refusal(tiny_gguf[:point], tmp_path)
        assert re.search(r"cut short|not a GGUF file|is empty", message), (point, message)
        assert "\n" not in message


def test_any_damaged_header_is_refused_or_read(tiny_gguf: bytes, tmp_path: Path):
    """Bytes set to 0xFF in turn: lengths, counts, types, values and text all become nonsense somewhere."""
    file = tmp_path / "damaged.gguf"
    end = tiny_gguf.rindex(b"blk.2.")
    refused = 0
    for at in [*range(0, 1200, 3), *range(1200, end, 29)]:
        content = bytearray(tiny_gguf)
        content[at] = 0xFF
        file.write_bytes(content)
        try:
            make_plan(file)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"garbage" * 10, "is not a GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(100), "GGUF version 1"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(100), "big-endian"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path):
    assert message in refusal(content, tmp_path)


def test_tensor_outside_the_file_is_refused(tiny_gguf: bytes, tmp_path: Path):
    name = b"blk.0.ffn_up.weight"
    at = tiny_gguf.index(name) + len(name) + 4 + 16 + 4  # two dimensions and the type stand before the offset
    content = bytearray(tiny_gguf)
    content[at : at + 8] = (2**62).to_bytes(8, "little")
    assert "blk.0.ffn_up.weight ends at byte" in refusal(bytes(content), tmp_path)
