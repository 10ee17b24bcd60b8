"""What visitors may do, and how often."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from skipvision_train.errors import ConfigError


class RefusalError(Exception):
    """A request that is not served, with what its sender is told.

    Args:
        status: of the HTTP answer.
        message: what is wrong, and what would be right.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass
class Limits:
    """Bounds of what visitors may use. More is refused with a message that names the bound."""

    upload_mb: float = 10
    """Size of an uploaded file, MiB; counted while it is read."""
    pixels: int = 25_000_000
    """Of an uploaded image; its header is read before anything is decoded."""
    images: int = 4
    """In a question."""
    chat_images: int = 12
    """In a chat, those of the next question included."""
    turns: int = 20
    """Questions in a chat."""
    characters: int = 4000
    """In a question."""
    tokens: int = 1024
    """Of a question's text."""
    prompt_tokens: int = 8192
    """Of a whole prompt: images, what was said before, the question. Never more than the model has positions for."""
    questions_per_minute: int = 20
    """Of a client, which is an address."""
    uploads_per_minute: int = 60
    """Of a client."""
    uploads: int = 4
    """That are read and decoded at the same time, of all clients."""
    upload_seconds: float = 60
    """How long an upload may take."""
    queue: int = 32
    """Questions that wait, of all clients."""
    sessions: int = 200
    """Visitors whose chats are kept; the one that was away longest makes room."""
    sessions_per_minute: int = 60
    """New ones of a client."""
    idle_minutes: float = 60
    """After which a visitor's chat is forgotten."""
    memory_mb: float = 1024
    """Uploaded images of all visitors, MiB; the visitor that was away longest makes room."""

    def check(self) -> None:
        """Refuse bounds that allow nothing.

        Raises:
            ConfigError: the first such field.
        """
        for each in fields(self):
            value, is_count = getattr(self, each.name), each.type == "int"
            if not (value >= 1 if is_count else value > 0):
                raise ConfigError(f"limits.{each.name}: {value}; {'at least 1' if is_count else 'above 0'}")
        if self.chat_images < self.images:
            raise ConfigError(f"limits.chat_images: {self.chat_images}; at least limits.images, which is {self.images}")
        if self.memory_mb < (least := self.upload_mb * self.chat_images):
            raise ConfigError(
                f"limits.memory_mb: {self.memory_mb:g}; at least limits.upload_mb x limits.chat_images, {least:g}"
            )

    @property
    def upload_bytes(self) -> int:
        """``upload_mb`` in bytes."""
        return int(self.upload_mb * 2**20)


@dataclass
class Rate:
    """At most so many events a minute for each client.

    Args:
        per_minute: events.
        what: their name in the refusal.
        clock: seconds.
    """

    per_minute: int
    what: str
    clock: Callable[[], float] = time.monotonic
    _events: dict[str, deque[float]] = field(default_factory=dict)

    def take(self, client: str) -> None:
        """Count one event.

        Raises:
            RefusalError: 429, and when the next is possible.
        """
        now = self.clock()
        for known in [name for name, times in self._events.items() if times[-1] <= now - 60]:
            del self._events[known]
        times = self._events.setdefault(client, deque())
        while times and times[0] <= now - 60:
            times.popleft()
        if len(times) >= self.per_minute:
            seconds = int(times[0] + 60 - now) + 1
            raise RefusalError(429, f"at most {self.per_minute} {self.what} a minute; the next in {seconds} s")
        times.append(now)
