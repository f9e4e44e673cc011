"""This package and the original do the same in every sequence of steps, apart from a list of differences."""

import contextlib
import functools
import os

import pytest
from differential import steps
from differential.intended import DIFFERENCES
from differential.pair import Observation, Pair, Unlisted, compare, reduced
from hypothesis import Phase, given, seed, settings
from original import Unavailable, original_directory

import posix_ipc

pytestmark = pytest.mark.ipc_leaks(
    fds=False, children=False, reason="the pair starts its processes when they are needed"
)

# Random sequences come in shards, so that all processors take part and progress shows.
SHARD = 100
SEQUENCES = int(os.environ.get("POSIX_IPC_DIFFERENTIAL", 200))
FIRST_SEED = int(os.environ.get("POSIX_IPC_DIFFERENTIAL_SEED", 0))


@pytest.fixture(scope="module")
def pair():
    try:
        directory = original_directory()
    except Unavailable as error:
        if "POSIX_IPC_DIFFERENTIAL" in os.environ:  # somebody asked for just this
            pytest.fail(str(error))
        pytest.skip(str(error))
    with contextlib.closing(Pair(directory)) as pair:
        yield pair


@pytest.mark.slow
@pytest.mark.parametrize("number", range(FIRST_SEED, FIRST_SEED + -(-SEQUENCES // SHARD)), ids="seed {}".format)
def test_random_sequences(pair, number):
    failed = []

    @seed(number)
    @settings(max_examples=SHARD, deadline=None, database=None, phases=[Phase.generate])
    @given(steps.sequences)
    def check(sequence):
        sequence = steps.with_looks(sequence)
        if not failed and (told := failure(pair, sequence)):
            failed.append((sequence, told))

    check()
    for sequence, told in failed:  # one at most
        compare(pair, reduced(sequence, functools.partial(failure, pair)))
        pytest.fail(f"once only: {sequence}\n{told}")


def failure(pair, sequence):
    """What is said of a difference that is not listed; None if there is none."""
    try:
        compare(pair, sequence)
    except Unlisted as unlisted:
        return str(unlisted)
    return None


@pytest.mark.slow
@pytest.mark.no_sanitizer  # it tells the crashes of the original in its own way
@pytest.mark.parametrize("difference", [pytest.param(each, id=each.id) for each in DIFFERENCES])
def test_each_intended_difference_is_there(pair, difference):
    for example in difference.examples:
        *_, (step, ours, theirs) = pair.run(example)
        assert step == example[-1], f"ended early: {ours} {theirs}"
        shown = ours != theirs and difference.applies(step, ours, theirs)
        if difference.chance and not shown:
            pytest.skip(f"it went well in the original: {theirs.outcome}")
        assert shown, f"here {ours}\nthere {theirs}"


def test_constants(pair):
    """All that the original has are here, and have its values."""
    *_, (_, _, theirs) = pair.run([("constants",)])
    names = set(theirs.outcome[1]) - {"VERSION"}
    assert len(names) > 15
    assert compare(pair, [("get_module", name) for name in sorted(names)]) == []


def test_a_difference_that_is_not_listed_is_told(pair):
    sequence = [("get", "sem0", "value"), ("only_here",), ("text", "sem0")]
    assert reduced(sequence, functools.partial(failure, pair)) == [("only_here",)]
    with pytest.raises(Unlisted, match=r"\('only_here',\)\n.*True"):
        compare(pair, sequence)


def test_a_death_or_a_descriptor_of_ours_is_never_intended():
    """Whatever the original does at that step: none of the predicates may be so generous."""
    state = {"files": {}, "queues": {}, "descriptors": [3]}
    dead = Observation(outcome=("death", 11), event=None, **state)
    for difference in DIFFERENCES:
        for example in difference.examples:
            for theirs in (("value", None), ("error", ("OSError",), 0)):
                run = FakeRun((example[-1], dead, dead._replace(outcome=theirs)))
                with pytest.raises(Unlisted):
                    compare(run, [example[-1]])
    quiet = dead._replace(outcome=("value", None))
    refused = dead._replace(outcome=("error", ("OSError",), 0))
    for step, theirs in (
        (("call", "mq0", "close", ()), quiet),
        (("call", "mq0", "request_notification", ()), refused),
        (("open", "sem0", ("a", posix_ipc.O_CREAT | os.O_TRUNC), {}), quiet),
    ):
        with pytest.raises(Unlisted):
            compare(FakeRun((step, theirs._replace(descriptors=[3, 4]), theirs)), [step])


class FakeRun:
    """Observations that nobody made."""

    def __init__(self, *observations):
        self._observations = observations

    def run(self, sequence):
        yield from self._observations
