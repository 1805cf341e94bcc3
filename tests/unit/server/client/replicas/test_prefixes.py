"""The record of sent prompts against a plain search through all of them."""

from hypothesis import given
from hypothesis import strategies as st

from stellarbyte_server.client.replicas.prefixes import MAX_BLOCKS, SentPrefixes, prefix_keys

prompts = st.lists(st.tuples(st.sampled_from(["", "x"]), st.lists(st.integers(0, 1), max_size=12)), max_size=12)


@given(prompts, st.tuples(st.sampled_from(["", "x"]), st.lists(st.integers(0, 1), max_size=12)))
def test_the_longest_common_prefix_in_whole_blocks_is_found(sent, asked) -> None:
    record = SentPrefixes(1000)
    for salt, tokens in sent:
        record.note(prefix_keys(tokens, (salt,), 3))
    salt, tokens = asked
    common = [
        next((i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), min(len(tokens), len(other)))
        for other_salt, other in sent
        if other_salt == salt
    ]
    assert record.num_blocks(prefix_keys(tokens, (salt,), 3)) == max(common, default=0) // 3


def test_the_record_is_bounded_and_forgets_the_ends_of_the_oldest_first() -> None:
    record = SentPrefixes(6)
    first, second = ([prompt] * 16 for prompt in (1, 2))
    keys = [prefix_keys(tokens, (), 4) for tokens in (first, second)]
    record.note(keys[0])
    record.note(keys[1])
    assert [record.num_blocks(each) for each in keys] == [2, 4]
    record.clear()
    assert [record.num_blocks(each) for each in keys] == [0, 0]


def test_few_blocks_of_a_long_prompt_are_looked_at() -> None:
    assert len(prefix_keys([1] * 100_000, (), 16)) == MAX_BLOCKS
