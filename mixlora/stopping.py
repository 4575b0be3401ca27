"""How a run hears that it shall stop: a signal, or a file that appears in its folder.

    stop = Stop(folder / "stop")
    with stop.listening():
        while not stop.asked():
            ...a step...

SIGTERM, SIGINT and SIGHUP are heard between two steps. A second SIGINT is an ordinary one and ends
the program where it is. A signal that the program was started to ignore (nohup) stays ignored.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

from mixlora import processes

Result = TypeVar("Result")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _Leave(BaseException):
    """Ends what need not be finished."""


class Stop:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.by: str | None = None  # the signal's name, or the file's path
        self.exit_code = 0  # of a program that stops: 128 + the signal's number, 0 for the file
        self._may_leave = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Only here are signals heard, and only a program's main thread hears any. A file that
        nobody has seen at the end is deleted."""
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in SIGNALS if is_main}
        heard = {number for number, handler in before.items() if handler != signal.SIG_IGN}
        for number in heard:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number in heard:
                signal.signal(number, before[number])
            self.file.unlink(missing_ok=True)

    def asked(self) -> bool:
        """In any process. The file is deleted when it is seen, so that the run can go on."""
        if self.by is None and processes.is_first() and self.file.exists():
            self.file.unlink()
            self.by = str(self.file)
        heard = processes.gathered([[self.by, self.exit_code]] if self.by else [])
        if heard:
            self.by, self.exit_code = heard[0]
        return bool(heard)

    def unless_asked(self, work: Callable[[], Result]) -> Result | None:
        """`work()`, which leaves nothing to save: None if a signal comes before it is done."""
        if self.asked():
            return None
        self._may_leave = processes.world_size() == 1  # others would wait for what it left undone
        try:
            return work()
        except _Leave:
            return None
        finally:
            self._may_leave = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        if self.by is None:
            self.by, self.exit_code = signal.Signals(number).name, 128 + number
        if self._may_leave:
            self._may_leave = False
            raise _Leave
