"""Ctrl-C: at once and never lost, or after the running step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from flarec.base.interrupts import Interrupts


@pytest.fixture(autouse=True)
def handler_comes_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


class Swallows:
    """An object whose destructor is interrupted: Python reports the exception and goes on."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_library_swallows_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        interrupts.check()
        victim = Swallows()
        del victim
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_a_step_is_finished_and_a_second_interrupt_stops_it() -> None:
    with Interrupts(finish_step=True) as interrupts:
        assert not interrupts.requested
        signal.raise_signal(signal.SIGINT)
        assert interrupts.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_sigterm_finishes_the_step_however_often_it_comes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts(finish_step=True) as interrupts:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert (interrupts.requested, interrupts.signal) == (True, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("finish_step", [False, True])
def test_sigterm_is_left_alone_where_it_is_ignored_or_nothing_is_lost(finish_step: bool) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN if finish_step else signal.SIG_DFL)
    try:
        expected = signal.getsignal(signal.SIGTERM)
        with Interrupts(finish_step=finish_step):
            assert signal.getsignal(signal.SIGTERM) is expected
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_leave_signals_alone() -> None:
    seen: list[object] = []

    def work() -> None:
        with Interrupts(finish_step=True) as interrupts:
            seen.extend([signal.getsignal(signal.SIGINT), interrupts.requested])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT), False]
