"""Visitors and their chats, in memory. Everything here runs in the server's event loop, so that nothing is locked."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from skipvision_train.serve.limits import Limits, RefusalError

if TYPE_CHECKING:
    from skipvision_train.serve.queue import Job


@dataclass(frozen=True)
class Upload:
    """An image that a visitor sent.

    Attributes:
        id: names it within its chat; unguessable.
        data: the file.
        preview: a small JPEG of what was decoded.
        width: of the image, upright, pixels.
        height: likewise.
    """

    id: str
    data: bytes = field(repr=False)
    preview: bytes = field(repr=False)
    width: int
    height: int

    def facts(self) -> dict[str, Any]:
        """What the page is told."""
        return {"id": self.id, "width": self.width, "height": self.height}


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    Attributes:
        text: the question as it was typed.
        images: ids.
        answer: fields of its ``done`` event.
    """

    text: str
    images: tuple[str, ...]
    answer: dict[str, Any]


@dataclass
class Chat:
    """What was said, and the images that were sent, those for the next question included."""

    exchanges: list[Exchange] = field(default_factory=list)
    uploads: dict[str, Upload] = field(default_factory=dict)
    job: Job | None = None
    """The question that waits or is being answered."""

    @property
    def waiting(self) -> list[Upload]:
        """Images that no answered question has shown."""
        shown = {name for exchange in self.exchanges for name in exchange.images}
        return [upload for name, upload in self.uploads.items() if name not in shown]

    @property
    def bytes(self) -> int:
        """Memory of the images."""
        return sum(len(upload.data) + len(upload.preview) for upload in self.uploads.values())

    def chosen(self, names: Sequence[str]) -> list[Upload]:
        """The images of the next question.

        Raises:
            RefusalError: 400, one that is not there, was shown before, or is named twice.
        """
        waiting = {upload.id: upload for upload in self.waiting}
        if len(set(names)) != len(names) or not set(names) <= set(waiting):
            raise RefusalError(400, "images: this chat has no such image waiting; upload it again")
        return [waiting[name] for name in names]


@dataclass
class Session:
    """One visitor.

    Attributes:
        seen: when the last request came, seconds.
    """

    id: str
    seen: float
    chat: Chat = field(default_factory=Chat)


class Sessions:
    """All visitors, the one that was away longest first.

    Args:
        limits: ``sessions``, ``idle_minutes`` and ``memory_mb`` are used.
        clock: seconds.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._all: OrderedDict[str, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._all)

    def find(self, name: str | None) -> Session | None:
        """The visitor of that id, if it is known and was not away too long."""
        self._forget_idle()
        session = self._all.get(name) if name is not None else None
        if session is not None:
            session.seen = self._clock()
            self._all.move_to_end(session.id)
        return session

    def begin(self) -> Session:
        """A new visitor.

        Raises:
            RefusalError: 503, there are too many, and all of them have questions in the queue.
        """
        self._forget_idle()
        self._make_room(lambda: len(self._all) >= self._limits.sessions)
        session = Session(secrets.token_urlsafe(32), self._clock())
        self._all[session.id] = session
        return session

    def add(self, session: Session, upload: Upload) -> None:
        """Keep an image.

        Raises:
            RefusalError: 400, too many in the chat; 503, no memory is left.
        """
        if len(session.chat.uploads) >= self._limits.chat_images:
            most = self._limits.chat_images
            raise RefusalError(400, f"images: at most {most} in a chat; take one away or start a new chat")
        size, most_bytes = len(upload.data) + len(upload.preview), self._limits.memory_mb * 2**20
        self._make_room(lambda: self._bytes() + size > most_bytes, keep=session)
        session.chat.uploads[upload.id] = upload

    def _bytes(self) -> int:
        return sum(session.chat.bytes for session in self._all.values())

    def _forget_idle(self) -> None:
        oldest = self._clock() - 60 * self._limits.idle_minutes
        for session in [s for s in self._all.values() if s.seen < oldest and s.chat.job is None]:
            del self._all[session.id]

    def _make_room(self, is_full: Callable[[], bool], keep: Session | None = None) -> None:
        while is_full():
            leaving = next((s for s in self._all.values() if s.chat.job is None and s is not keep), None)
            if leaving is None:
                raise RefusalError(503, "too many visitors at the moment; try again in a minute")
            del self._all[leaving.id]
