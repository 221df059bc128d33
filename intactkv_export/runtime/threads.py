"""One model used from several threads, and after fork: its calls take turns.

A call has the model for itself until it returns, a reply that is read piece by piece until its last piece. A reply
that nobody reads on for a second has to wait its turn again when another call wants the model. What that call
leaves behind is then put right before the reply goes on, so both come out as they would alone.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from intactkv_export.errors import IntactKVError

PATIENCE = 1.0  # seconds that a reply may go unread while another call waits


class Shared(Protocol):
    """What takes turns: it can say where a sequence stands, and go back there."""

    def sequence_now(self) -> Any: ...
    def go_on_with(self, sequence: Any) -> None: ...


class _Call:
    """A call, or a reply in pieces. left: where its sequence stood when another call took over."""

    def __init__(self) -> None:
        self.read_at = time.monotonic()
        self.left: Any = None


class _Inside(threading.local):
    call: _Call | None = None


class Turns:
    """Whose turn it is with one model."""

    def __init__(self, model: Shared) -> None:
        self._model = weakref.ref(model)
        self._changed = threading.Condition()
        self._holder: _Call | None = None
        self._running: int | None = None  # the thread that is in the holder's call now
        self._inside = _Inside()
        self._refusal: str | None = None
        _all.add(self)

    @property
    def inside(self) -> bool:
        """Whether this thread is in a call that has its turn: what it calls belongs to that."""
        return self._inside.call is not None

    @contextmanager
    def turn(self, call: _Call | None = None, *, between: bool = False) -> Iterator[None]:
        """The model for this block. call: a reply that keeps its turn behind the block.

        between: for what changes nothing: it need not wait for the end of a reply, only of the piece.
        Raises IntactKVError if the model is closed, or cannot be used in this process.
        """
        mine = call or _Call()
        with self._changed:
            while not self._free_for(mine, between):
                self._changed.wait(self._seconds_left())
            if self._refusal is not None:
                raise IntactKVError(self._refusal)
            held = self._holder
            if not between and held is not mine and held is not None and (model := self._model()) is not None:
                held.left = model.sequence_now()
            self._holder, self._running = held if between else mine, threading.get_ident()
            self._inside.call = mine
        try:
            if mine.left is not None and (model := self._model()) is not None:
                left, mine.left = mine.left, None
                model.go_on_with(left)
            yield
        finally:
            with self._changed:
                self._inside.call, self._running = None, None
                mine.read_at = time.monotonic()
                if call is None and not between:
                    self._holder = None
                self._changed.notify_all()

    def end(self, call: _Call) -> None:
        """A reply is over, read or not."""
        with self._changed:
            if self._holder is call:
                self._holder = None
                self._changed.notify_all()

    def close(self, free: Callable[[], None], why: str) -> None:
        """When no call is running, free(); from now on every call raises IntactKVError(why)."""
        with self._changed:
            while self._running not in (None, threading.get_ident()):
                self._changed.wait()
            self._refusal = why
            free()
            self._changed.notify_all()

    def _free_for(self, call: _Call, between: bool) -> bool:
        if self._running is not None:
            return False
        return between or self._holder in (None, call) or self._seconds_left() == 0

    def _seconds_left(self) -> float | None:
        """Until the holder may be made to wait; None: not before it has returned."""
        if self._running is not None or self._holder is None:
            return None
        return max(self._holder.read_at + PATIENCE - time.monotonic(), 0)

    def after_fork(self, parent: int) -> None:
        """In the child: only the thread that forked goes on, and locks that others held stay locked for ever."""
        running = self._running
        self._changed = threading.Condition()
        if running not in (None, threading.get_ident()):
            self._refusal = (
                f"this model was evaluating in another thread when process {parent} was forked into {os.getpid()}: "
                "open it again in this process, or fork before it is used"
            )
            self._running = None


_all: weakref.WeakSet[Turns] = weakref.WeakSet()


def _after_fork() -> None:
    for turns in list(_all):
        turns.after_fork(os.getppid())


os.register_at_fork(after_in_child=_after_fork)


def takes_turns(*, calls: tuple[str, ...], replies: tuple[str, ...], reads: tuple[str, ...]) -> Callable[[type], type]:
    """A class decorator: these methods, the inherited ones too, wait for their turn with self._turns.

    calls: methods that return when they are done; replies: generators; reads: methods that change nothing.
    """

    def decorate(cls: type) -> type:
        for name in calls:
            setattr(cls, name, _call(getattr(cls, name), between=False))
        for name in reads:
            setattr(cls, name, _call(getattr(cls, name), between=True))
        for name in replies:
            setattr(cls, name, _reply(getattr(cls, name)))
        return cls

    return decorate


def _call(method: Callable[..., Any], between: bool) -> Callable[..., Any]:
    @functools.wraps(method)
    def in_turn(self: Any, *args: Any, **kwargs: Any) -> Any:
        turns: Turns | None = getattr(self, "_turns", None)
        if turns is None or turns.inside:  # still opening, or part of a call that has its turn
            return method(self, *args, **kwargs)
        with turns.turn(between=between):
            return method(self, *args, **kwargs)

    return in_turn


def _reply(method: Callable[..., Generator[Any, Any, Any]]) -> Callable[..., Generator[Any, Any, Any]]:
    @functools.wraps(method)
    def in_turn(self: Any, *args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        turns: Turns = self._turns
        pieces = method(self, *args, **kwargs)
        if turns.inside:
            return (yield from pieces)
        call, sent = _Call(), None
        try:
            while True:
                with turns.turn(call):
                    try:
                        piece = pieces.send(sent)
                    except StopIteration as end:
                        return end.value
                sent = yield piece
        finally:
            _close(self, turns, call, pieces)
            turns.end(call)

    return in_turn


def _close(model: Any, turns: Turns, call: _Call, pieces: Generator[Any, Any, Any]) -> None:
    """End a reply that may not have been read to its end: it then drops what was guessed of it, in its turn."""
    if inspect.getgeneratorstate(pieces) == inspect.GEN_CLOSED:
        return
    if turns.inside:  # collected in the middle of a call of this thread
        pieces.close()
        return
    gone = call.left is not None and model.draft_model is None  # another sequence is there, nothing is to be dropped
    try:
        with turns.turn(None if gone else call, between=gone):
            pieces.close()
    except IntactKVError:  # the model is closed: there is nothing to drop
        model.n_tokens = 0
        pieces.close()
