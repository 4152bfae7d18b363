"""How late it is at the broker, however wrong this machine's clocks are."""

from datetime import timedelta

from broker.sdk.verifier.moments import LEEWAY_S, BrokerTime
from tests.verifier.conftest import NOW

EPOCH = int(NOW.timestamp())


def test_what_was_signed_just_now_is_fresh_for_the_bound_and_not_longer(clocks):
    time = BrokerTime(clocks.timing())
    assert time.saw(EPOCH)
    until = time.until(EPOCH, 15)
    clocks.forward(14.9)
    assert not until.is_over(time.now())
    clocks.forward(0.2)
    assert until.is_over(time.now())


def test_a_wall_clock_that_is_set_back_makes_nothing_younger(clocks):
    time = BrokerTime(clocks.timing())
    assert time.saw(EPOCH)
    until = time.until(EPOCH, 15)
    clocks.forward(16)
    clocks.wall -= timedelta(minutes=10)
    assert until.is_over(time.now())
    assert time.now().broker >= EPOCH + 15
    assert not time.saw(EPOCH + 16)
    assert 580 < time.behind_s < 605


def test_a_machine_that_slept_believes_nothing_of_before(clocks):
    time = BrokerTime(clocks.timing())
    time.saw(EPOCH)
    until = time.until(EPOCH, 15)
    clocks.wall += timedelta(hours=1)
    assert until.is_over(time.now())


def test_a_clock_that_is_behind_what_was_signed_is_noticed(clocks):
    time = BrokerTime(clocks.timing())
    assert time.saw(EPOCH + LEEWAY_S)
    assert time.behind_s == 0
    assert not time.saw(EPOCH + 600)
    assert time.behind_s == 600
    clocks.wall += timedelta(seconds=600)
    assert time.saw(EPOCH + 600)
    assert time.behind_s == 0


def test_to_a_clock_that_is_ahead_everything_is_old(clocks):
    time = BrokerTime(clocks.timing())
    assert time.saw(EPOCH - 600)
    assert time.until(EPOCH - 600, 15).is_over(time.now())


def test_an_old_statement_that_comes_again_is_as_old_as_it_is(clocks):
    time = BrokerTime(clocks.timing())
    time.saw(EPOCH)
    clocks.monotonic += 20  # the wall clock stands still, and would take it for new
    assert time.saw(EPOCH)
    assert time.until(EPOCH, 15).is_over(time.now())


def test_clocks_that_run_a_little_faster_do_not_make_a_good_statement_old_after_days(clocks):
    time = BrokerTime(clocks.timing())
    day = 86_400
    time.saw(EPOCH)
    clocks.wall += timedelta(seconds=day)
    clocks.monotonic += day * 1.0002
    assert time.saw(EPOCH + day)
    until = time.until(EPOCH + day, 15)
    clocks.forward(14)
    assert not until.is_over(time.now())
