"""Where an answer is in the prediction of it."""

import random
from array import array

from stellarbyte_server.engine.drafts.prediction import PredictedAnswer


def follow(prediction: list[int], answer: list[int], prompt: tuple[int, ...] = (7, 8)) -> tuple[PredictedAnswer, int]:
    """The prediction at the end of the answer, and how many of its tokens were expected."""
    predicted, tokens, num_expected = PredictedAnswer(tuple(prediction)), array("I", prompt), 0
    for token in answer:
        num_expected += predicted.expected(1) == (token,)
        tokens.append(token)
        predicted.read(tokens, len(prompt))
    return predicted, num_expected


def test_an_answer_as_predicted_is_expected_as_a_whole() -> None:
    prediction = list(range(100, 160))
    predicted, num_expected = follow(prediction, prediction)
    assert predicted.num_found == num_expected == 60
    assert predicted.expected(5) == ()


def test_a_word_that_is_replaced_costs_little() -> None:
    prediction = list(range(100, 160))
    for start, stop, words in ((20, 21, [7]), (20, 23, [7]), (20, 21, [7, 8, 9]), (20, 20, [7, 8]), (20, 22, [])):
        answer = prediction[:start] + words + prediction[stop:]
        predicted, num_expected = follow(prediction, answer)
        assert predicted.num_found == 60 - (stop - start), (start, stop, words)
        assert num_expected >= 60 - (stop - start) - 3


def test_never_more_than_there_is() -> None:
    chance = random.Random(0)
    for _ in range(300):
        prediction = [chance.randrange(chance.choice([3, 50])) for _ in range(chance.randint(1, 40))]
        answer = [chance.choice(prediction) for _ in range(chance.randint(1, 60))]
        predicted, num_expected = follow(prediction, answer)
        assert num_expected <= predicted.num_found <= min(len(prediction), len(answer))
