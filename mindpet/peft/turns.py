"""What several threads may do with one model at the same time."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator
from typing import Callable

from mindpet.errors import AdapterError
from mindpet.peft.placement import Placement


class Turns:
    """Calls of a network beside one another, and changes of what it computes, which need it for themselves.

    A thread that comes at the wrong time gets an error and does not wait: a context can be open for long. Within its
    own changes and calls a thread may do all.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._calls, self._changes = [], []  # threads, once for each that is running
        self._chosen = weakref.WeakKeyDictionary()  # thread -> name of the adapter that it made the active one

    def __deepcopy__(self, memo):
        return type(self)()

    @contextlib.contextmanager
    def call(self, placement: Placement) -> Iterator[None]:
        """A context for a call of the network.

        Raises:
            AdapterError: another thread changes what is computed; or it has made another adapter the active one than
                this thread.
        """
        with self._take(self._calls, (self._changes,), "the call"):
            active = placement.active
            chosen = self._chosen.get(threading.current_thread(), active)
            if active is not None and chosen != active:
                raise AdapterError(
                    f"this thread made {chosen!r} the active adapter, but another thread {active!r} since. Threads "
                    "that switch need a lock around set_adapter() and the call, or 'adapter_names'."
                )
            yield

    def change(self, owner: str) -> contextlib.AbstractContextManager[None]:
        """A context for a change; `owner` is for the message.

        Raises:
            AdapterError: another thread calls the network, or changes what it computes.
        """
        return self._take(self._changes, (self._calls, self._changes), owner)

    def choose(self, name: str) -> None:
        """Note that this thread made an adapter the active one."""
        self._chosen[threading.current_thread()] = name

    @contextlib.contextmanager
    def _take(self, mine, others, owner):
        me = threading.current_thread()
        with self._lock:
            if any(thread is not me for kind in others for thread in kind):
                raise AdapterError(
                    f"{owner}: another thread is using the model. Calls may run at the same time, but not beside a "
                    "change of what is computed, an open disable_adapter() or a batch with 'adapter_names'."
                )
            mine.append(me)
        try:
            yield
        finally:
            with self._lock:
                mine.remove(me)


def alone(method: Callable) -> Callable:
    """A method of a PeftModel that needs the network for itself."""

    @functools.wraps(method)
    def change(self, *arguments, **keywords):
        with self._turns.change(method.__name__):
            return method(self, *arguments, **keywords)

    return change
