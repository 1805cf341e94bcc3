"""Blocks in host memory, against a dictionary in order of use."""

import random
from collections import OrderedDict

from stellarbyte_server.engine.offload.host_blocks import HostBlocks

NUM_SLOTS = 5


def test_random_uses_against_a_dictionary() -> None:
    """Pinned slots keep their content; of the others the least recently used makes room."""
    chance, host = random.Random(0), HostBlocks(NUM_SLOTS, 1)
    expected: OrderedDict[bytes, int] = OrderedDict()  # key → content
    pins: list[tuple[int, int, bytes]] = []  # slot, content, key
    for number in range(5000):
        key = bytes([chance.randrange(9)])
        match chance.choice(["put", "put", "pin", "unpin", "touch", "drop", "give back"]):
            case "put":
                slot = host.reserve()
                held = {pin[2] for pin in pins if expected.get(pin[2]) == pin[1]}
                num_taken = len(expected) + len({pin[0] for pin in pins if expected.get(pin[2]) != pin[1]})
                evictable = [other for other in expected if other not in held]
                if num_taken == NUM_SLOTS and not evictable:
                    assert slot is None
                    continue
                assert slot is not None
                if num_taken == NUM_SLOTS:
                    del expected[evictable[0]]
                host.memory[slot, 0] = number % 256
                host.put(key, slot)
                expected.pop(key, None)
                expected[key] = number % 256
            case "pin":
                slot = host.pin(key)
                assert (slot is not None) is (key in expected)
                if slot is not None:
                    expected.move_to_end(key)
                    pins.append((slot, expected[key], key))
            case "unpin" if pins:
                host.unpin(pins.pop(chance.randrange(len(pins)))[0])
            case "touch":
                host.touch(key)
                if key in expected:
                    expected.move_to_end(key)
            case "drop":
                host.drop(key)
                expected.pop(key, None)
            case "give back" if (slot := host.reserve()) is not None:
                host.give_back(slot)
                expected = OrderedDict((each, value) for each, value in expected.items() if host.has(each))
        assert all(host.has(bytes([each])) is (bytes([each]) in expected) for each in range(9))
        assert all(host.memory[slot, 0] == value for slot, value, _ in pins)
