"""Keeps Python's garbage collector from halting streams."""

import gc

YOUNG_OBJECTS = 10_000  # more than a step of many streams makes and drops, so that not every step has a collection


def keep_for_good() -> None:
    """Whatever exists now stays until the process ends, so the collector looks at it no more.

    To be called when a process has what it works with. In one that has loaded torch and a model, a full collection
    took 0.2 s, in which no stream got a token.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)
