"""What an operator keeps of a job from round to round."""

import pytest

from pretrain_api.job import JobSpec
from pretrain_operator import observe, reconcile
from pretrain_operator.cluster import Kind
from pretrain_operator.testing import JOB, Bench


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the spec was known, round by round."""
    rounds: list[bool] = []

    def parse(body: observe.Json, spec: JobSpec | None = None) -> observe.Job:
        rounds.append(spec is not None)
        return observe.parse_job(body, spec)

    monkeypatch.setattr(reconcile, "parse_job", parse)
    return rounds


async def test_a_spec_is_parsed_once_and_again_when_it_changes(
    bench: Bench, known: list[bool]
) -> None:
    await bench.submit(workers={"replicas": 2, "minReplicas": 1, "maxReplicas": 2})
    operator = bench.operator()
    await bench.rest(operator)
    assert known == [False, *[True] * (len(known) - 1)]
    assert len(known) > 1
    known.clear()
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"workers": {"replicas": 1}}})
    await bench.rest(operator)
    assert len(bench.member_pods()) == 1
    assert known == [False, *[True] * (len(known) - 1)]


async def test_nothing_is_kept_of_a_job_that_is_gone_or_made_anew(
    bench: Bench, known: list[bool]
) -> None:
    await bench.submit()
    operator = bench.operator()
    await bench.rest(operator)
    bench.cluster.vanish(Kind.JOB, JOB)
    bench.cluster.vanish(Kind.CLAIM, f"{JOB}-checkpoint")  # is kept
    await bench.submit(workers={"replicas": 3})  # of the same name and generation
    known.clear()
    await bench.rest(operator)
    assert not known[0]
    assert len(bench.member_pods()) == 3
    bench.cluster.vanish(Kind.JOB, JOB)
    await bench.rest(operator)
    assert operator._specs == {}
