"""A soak repeats itself from its seed, and sees every difference."""

import json
import random

from pretrain_bench import faults
from pretrain_bench.soak import differences, draw
from pretrain_demo.job import Snapshot


def test_a_seed_repeats_the_faults() -> None:
    assert draw(random.Random(5), 50) == draw(random.Random(5), 50)
    assert draw(random.Random(5), 50) != draw(random.Random(6), 50)


def test_two_hundred_faults_are_of_every_kind() -> None:
    # Of the rarest two in a hundred and ten; one that comes never is a hole nobody sees.
    drawn = {fault.name for seed in range(5) for fault in draw(random.Random(seed), 200)}
    assert drawn == {fault.name for fault in faults.CATALOGUE}


def test_names_are_unique_and_explained() -> None:
    names = [fault.name for fault in faults.CATALOGUE]
    assert len(set(names)) == len(names)
    assert [fault.name for fault in faults.CATALOGUE if not fault.what] == []


class Finished:
    """Jobs with the digests and ledgers given."""

    def __init__(self, **jobs: tuple[dict[str, str], str | None]) -> None:
        self.jobs = jobs

    def digests(self, name: str) -> dict[str, str]:
        return self.jobs[name][0]

    def read(self, name: str) -> Snapshot:
        return Snapshot.parse(json.dumps({"status": {"progress": {"ledger": self.jobs[name][1]}}}))


def test_every_difference_is_named() -> None:
    same = {"model": "1", "optimizer": "2"}
    assert differences(Finished(a=(same, "l"), b=(same, "l")), "a", "b") == []
    other = Finished(a=({"model": "1"}, "k"), b=(same, "l"))
    assert [text.partition(":")[0] for text in differences(other, "a", "b")] == [
        "optimizer",
        "the ledger in the status",
    ]
    unknown = Finished(a=(same, None), b=(same, None))
    assert len(differences(unknown, "a", "b")) == 1
