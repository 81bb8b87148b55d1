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


def test_other_threads_leave_signals_alone() -> None:
    seen: list[object] = []

    def work() -> None:
        with Interrupts(finish_step=True) as interrupts:
            seen.extend([signal.getsignal(signal.SIGINT), interrupts.requested])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT), False]
