"""Quality by the oracle, speed by a clock that the test moves, and the scales of the radar."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from stellarbyte import ByteTransformer
from stellarbyte.analysis import speed as speed_module
from stellarbyte.analysis.quality import measure_quality
from stellarbyte.analysis.radar import SCALES, radar_axes
from stellarbyte.analysis.speed import DECODED_TOKENS, Speed, measure_speed
from stellarbyte.analysis.text import Text, TokenizedText
from stellarbyte.cache.relative import RelativeCache
from tests.support.models import oracle
from tests.support.models.byte_transformer import VARIANTS, make_model, random_tokens


def tokens(count: int, num_special: int) -> TokenizedText:
    ids = tuple(random_tokens(count))
    text = Text(name=None, content="河" * 40)
    return TokenizedText(text=text, ids=ids, num_special=num_special, num_unknown=3, labels=("",) * count)


@pytest.mark.parametrize("num_special", [0, 1, 2])
@pytest.mark.parametrize(("count", "context"), [(30, 100), (31, 10), (30, 29), (2 * 14 + 1, 14)])
def test_bits_per_byte_are_the_length_of_the_code(
    count: int, context: int, num_special: int, device: torch.device
) -> None:
    model, text = make_model(**VARIANTS["xpos window sinks"]), tokens(count, num_special)
    found = measure_quality(model.to(device), text, context)
    model.cpu()
    nats = []
    for place in range(max(1, num_special), count):
        start = (place - 1) // context * context  # of the context that predicts this token
        logprobs = oracle.logprobs(model.state_dict(), model.config, list(text.ids[start:place]))
        nats.append(-float(logprobs[-1, text.ids[place]]))
    first = 0 if num_special else math.log2(model.config.vocab_size)
    assert found.bits_per_byte == pytest.approx((first + sum(nats) / math.log(2)) / 120, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    assert (found.num_bytes, found.num_tokens, found.num_predicted) == (120, count, len(nats))
    assert (found.num_unknown, found.context) == (3, context)


def test_no_context_is_longer_than_the_models() -> None:
    model = make_model(max_position_embeddings=16)
    assert measure_quality(model, tokens(40, 1)).context == 16


class Clock:
    """Shows the sums of given durations: of a prompt, of its decoding, and of the pause before the next round."""

    def __init__(self, prompts: list[float], decodings: list[float]) -> None:
        pairs = itertools.chain.from_iterable(zip(prompts, decodings, itertools.repeat(1000.0)))
        self.times = itertools.accumulate(itertools.chain([0.0], pairs))

    def __call__(self) -> float:
        return next(self.times)


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RelativeCache]]:
    """Every cache that is made while speed is measured."""
    made: list[RelativeCache] = []

    def make(*arguments: object) -> RelativeCache:
        made.append(RelativeCache(*arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(speed_module, "RelativeCache", make)
    yield made


def test_speeds_are_medians_after_a_warm_up_each_with_a_new_cache(caches: list[RelativeCache]) -> None:
    clock = Clock(prompts=[500, 3, 1, 2], decodings=[4000, 8, 80, 24])
    (found,) = measure_speed(make_model(), (2,), (6,), clock=clock)
    assert found == Speed(batch=2, length=6, prompt_s=2, step_s=24 / DECODED_TOKENS)
    assert (found.prompt_tokens_per_s, found.decoded_tokens_per_s) == (2 * 6 / 2, 2 / (24 / DECODED_TOKENS))
    assert [cache.get_seq_length() for cache in caches] == [6 + DECODED_TOKENS] * 4


def test_batches_and_lengths_are_all_measured_and_lengths_fit_the_context(device: torch.device) -> None:
    model = make_model(max_position_embeddings=30).to(device)
    found = list(measure_speed(model, (1, 3), (5, 100, 200)))
    assert [(one.length, one.batch) for one in found] == [(5, 1), (5, 3), (22, 1), (22, 3)]
    assert all(one.prompt_s is not None and one.step_s is not None for one in found)
    assert min(time for one in found for time in (one.prompt_s or 0, one.step_s or 0)) > 0
    assert not any(one.is_out_of_memory for one in found)


def test_a_batch_that_does_not_fit_is_told_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ByteTransformer.forward

    def limited(self: ByteTransformer, input_ids: torch.Tensor, **arguments: object) -> object:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError
        return forward(self, input_ids, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ByteTransformer, "forward", limited)
    small, large = measure_speed(make_model(), (2, 4), (5,))
    assert not small.is_out_of_memory and small.step_s is not None
    assert large == Speed(batch=4, length=5, prompt_s=None, step_s=None, is_out_of_memory=True)
    assert large.prompt_tokens_per_s is None and large.decoded_tokens_per_s is None


def test_scores_of_the_radar_are_positions_on_stated_scales() -> None:
    axes = {axis.name: axis for axis in radar_axes({"size": 1e9, "speed": 100.0, "memory": 2.0**35, "quality": 1.2})}
    assert axes["size"].score == pytest.approx(0.5)  # half-way from 10^12 to 10^6
    assert axes["speed"].score == pytest.approx(0.5)  # from 1 to 10^4
    assert axes["memory"].score == pytest.approx(0.25)  # from 2^40 to 2^20
    assert axes["quality"].score == pytest.approx((4 - 1.2) / 3.5)
    assert (axes["quality"].value, axes["quality"].worst, axes["quality"].best) == (1.2, 4.0, 0.5)
    for name, scale in SCALES.items():
        assert (scale.score(scale.worst), scale.score(scale.best)) == (0, 1), name
    beyond = radar_axes({"size": 1e3, "speed": 0.0, "memory": 2.0**50, "quality": 9.0})
    assert [axis.score for axis in beyond] == [1, 0, 0, 0]


def test_axes_that_were_not_measured_are_absent() -> None:
    axes = radar_axes({"size": 1e9, "speed": None, "memory": 2.0**35, "quality": None})
    assert [axis.name for axis in axes] == ["size", "memory"]
