"""Questions in a line, answered one at a time by one thread.

The line, its jobs and their events belong to the server's event loop; the thread only runs the model and hands events
over with ``call_soon_threadsafe``. So nothing is locked.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from skipvision_train.errors import SkipVisionError
from skipvision_train.serve.limits import RefusalError

log = logging.getLogger(__name__)

Event = tuple[str, dict[str, Any]]
"""Name and fields, as the page gets them: ``queue``, ``start``, ``piece``, ``done``, ``error``."""


@dataclass(eq=False)
class Job:
    """A question.

    Attributes:
        plan: its name.
        said: questions and answers before it, with the images of the questions, as files' bytes.
        text: the question.
        images: its images.
        events: what happened, for one reader.
    """

    plan: str
    said: Sequence[tuple[str, Sequence[bytes], str]]
    text: str
    images: Sequence[bytes]
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    on_end: Callable[[Event], None] = lambda event: None
    """Is called once with the last event, before the reader gets it."""
    asked_at: float = field(default_factory=time.perf_counter)
    waited_ms: float = 0.0
    """In the line."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _is_over: bool = False

    @property
    def is_stopped(self) -> bool:
        """Whether the answer shall end where it is."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End the answer where it is; from any thread."""
        self._stop.set()

    def end(self, event: Event) -> None:
        """Hand out the last event; only the first call counts."""
        if not self._is_over:
            self._is_over = True
            self.on_end(event)
            self.events.put_nowait(event)


Answer = Callable[[Job, Callable[[str], None]], Mapping[str, Any]]
"""Runs the model: gets a job and what takes pieces of text, returns the fields of ``done``."""


class Line:
    """Jobs in the order in which they came. Start it with :meth:`run` as a task of the event loop.

    Args:
        answer: runs in the one thread; what it raises goes to the job's reader alone.
        length: jobs that may wait.
    """

    def __init__(self, answer: Answer, length: int) -> None:
        self._answer, self._length = answer, length
        self._waiting: deque[Job] = deque()
        self._arrived = asyncio.Event()

    def add(self, job: Job) -> None:
        """Put a job at the end.

        Raises:
            RefusalError: 503, the line is full.
        """
        if len(self._waiting) >= self._length:
            raise RefusalError(503, f"{self._length} questions are waiting already; try again in a minute")
        self._waiting.append(job)
        job.events.put_nowait(("queue", {"position": len(self._waiting)}))
        self._arrived.set()

    def stop(self, job: Job) -> None:
        """End a job: one that waits leaves the line, one that is being answered ends with what it has."""
        job.stop()
        if job in self._waiting:
            self._waiting.remove(job)
            job.end(("error", {"status": 499, "message": "stopped before the answer began"}))
            self._tell_positions()

    async def run(self) -> None:
        """Answer until the task is cancelled; the answer that runs then is stopped."""
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="skipvision-serve")
        job: Job | None = None
        try:
            while True:
                while not self._waiting:
                    self._arrived.clear()
                    await self._arrived.wait()
                job = self._waiting.popleft()
                self._tell_positions()
                job.waited_ms = 1000 * (time.perf_counter() - job.asked_at)
                job.events.put_nowait(("start", {}))
                job.end(await loop.run_in_executor(thread, self._answered, job, loop))
        finally:
            for left in [*([job] if job is not None else []), *self._waiting]:
                left.stop()
                left.end(("error", {"status": 503, "message": "the server is shutting down"}))
            thread.shutdown(wait=False, cancel_futures=True)

    def _tell_positions(self) -> None:
        for place, job in enumerate(self._waiting):
            job.events.put_nowait(("queue", {"position": place + 1}))

    def _answered(self, job: Job, loop: asyncio.AbstractEventLoop) -> Event:
        """Runs in the thread. Whatever goes wrong belongs to this job: the next one must be answered."""

        def give(text: str) -> None:
            loop.call_soon_threadsafe(job.events.put_nowait, ("piece", {"text": text}))

        try:
            return "done", dict(self._answer(job, give))
        except RefusalError as error:
            return "error", {"status": error.status, "message": error.message}
        except SkipVisionError as error:
            return "error", {"status": 400, "message": str(error)}
        except BaseException:
            log.exception("a question could not be answered")
            return "error", {
                "status": 500,
                "message": "the model failed on this question; the server log says why",
            }
