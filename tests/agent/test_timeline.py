"""When a start passed which stage, told from events and beats."""

import time

from pretrain_agent.board import Beat
from pretrain_agent.timeline import Stages
from pretrain_api.wire import Phase

NONE = Beat(Phase.WAITING, 0, 0.0)


def test_the_slowest_rank_decides_when_a_stage_was_reached() -> None:
    epoch = time.time() - time.monotonic()
    stages = Stages()
    stages.joined(3, 0, 10.0)
    stages.started(3, 0, 11.0)
    stages.look([NONE, Beat(Phase.STARTING, 0, 12.0)])
    stages.look([Beat(Phase.LOAD, 0, 13.0), Beat(Phase.STARTING, 0, 12.0)])
    assert stages.newest is not None
    assert stages.newest.load is None
    stages.look([Beat(Phase.LOAD, 0, 15.0), Beat(Phase.LOAD, 0, 14.0)])  # repeated at 15
    stages.look([Beat(Phase.DATA, 100, 16.0), Beat(Phase.LOAD, 0, 14.5)])
    assert stages.newest.first_step is None
    stages.look([Beat(Phase.FIRST_STEP, 100, 16.5), Beat(Phase.FIRST_STEP, 100, 17.0)])
    assert stages.newest.trained is None
    stages.look([Beat(Phase.DATA, 101, 18.0), Beat(Phase.SAVE, 101, 19.0)])
    stages.look([Beat(Phase.DATA, 102, 28.0), Beat(Phase.DATA, 102, 29.0)])
    times = stages.newest
    assert (times.generation, times.round, times.stopped) == (3, 0, None)
    seen = (times.joined, times.started, times.load, times.first_step, times.trained)
    assert [round(moment - epoch) for moment in seen if moment] == [10, 11, 14, 17, 19]


def test_a_start_that_loads_nothing_has_no_time_of_it() -> None:
    stages = Stages()
    stages.started(1, 0, 11.0)
    stages.look([Beat(Phase.STEP, 0, 12.0)])
    stages.look([Beat(Phase.DONE, 1, 13.0)])
    assert stages.newest is not None
    assert stages.newest.load is None
    assert stages.newest.trained is not None


def test_a_stop_begins_a_new_timeline_which_stale_beats_do_not_spoil() -> None:
    stages = Stages()
    stages.started(1, 0, 11.0)
    training = [Beat(Phase.STEP, 5, 12.0)]
    stages.look(training)
    stages.stopped(13.0, failed=True)
    stages.look(training)  # the board is cleared a moment later
    assert stages.newest is not None
    assert stages.newest.first_step is None
    stages.joined(1, 1, 13.5)
    stages.joined(2, 0, 13.6)  # asked again, in another generation
    stages.started(2, 0, 14.0)
    assert stages.restart_seconds is None
    stages.look([Beat(Phase.STARTING, 0, 14.5)])
    assert stages.restart_seconds == 1.5
    assert (stages.newest.generation, stages.newest.round) == (2, 0)
    assert stages.newest.stopped is not None


def test_a_restart_that_was_asked_for_is_not_timed() -> None:
    stages = Stages()
    stages.stopped(13.0, failed=False)
    stages.started(2, 0, 14.0)
    stages.look([Beat(Phase.STARTING, 0, 14.5)])
    assert stages.restart_seconds is None
