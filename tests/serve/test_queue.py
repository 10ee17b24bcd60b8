"""The line by itself: order, places, what is told and to whom, without a model or a connection."""

from __future__ import annotations

import asyncio
import threading

import pytest

from skipvision_train.errors import ConfigError
from skipvision_train.serve.limits import RefusalError
from skipvision_train.serve.queue import Job, Line


def job(text="q"):
    return Job("own", (), text, ())


def told(asked):
    """Everything that its reader has not read."""
    return [asked.events.get_nowait() for _ in range(asked.events.qsize())]


def no_answer(*_):
    raise AssertionError("nothing runs here")


def test_only_the_first_end_counts():
    async def main():
        asked, ends = job(), []
        asked.on_end = lambda event: ends.append((event, asked.events.qsize()))
        asked.end(("done", {"text": "a"}))
        asked.end(("error", {"status": 503}))
        assert ends == [(("done", {"text": "a"}), 0)]  # before the reader has it
        assert told(asked) == [("done", {"text": "a"})]

    asyncio.run(main())


def test_places_in_the_line():
    async def main():
        line, jobs = Line(no_answer, 3), [job() for _ in range(3)]
        for asked in jobs:
            line.add(asked)
        assert [told(asked) for asked in jobs] == [[("queue", {"position": place})] for place in (1, 2, 3)]
        with pytest.raises(RefusalError, match="3 questions are waiting") as refusal:
            line.add(job())
        assert refusal.value.status == 503
        line.stop(jobs[1])
        assert [asked.is_stopped for asked in jobs] == [False, True, False]
        ((name, fields),) = told(jobs[1])
        assert (name, fields["status"]) == ("error", 499)
        assert [told(jobs[0]), told(jobs[2])] == [[("queue", {"position": 1})], [("queue", {"position": 2})]]
        line.add(job())  # its place is free

    asyncio.run(main())


FAILED = {"status": 500, "message": "the model failed on this question; the server log says why"}
ERRORS = {
    "refused": (RefusalError(418, "a teapot"), {"status": 418, "message": "a teapot"}),
    "wrong": (ConfigError("x: wrong"), {"status": 400, "message": "x: wrong"}),
    "broken": (KeyError("secret"), FAILED),
    "ended": (SystemExit(3), FAILED),
}


def test_jobs_are_answered_in_order_and_errors_are_their_own():
    order, free = [], threading.Event()

    def answer(asked, give):
        assert free.wait(30)
        order.append(asked.text)
        if asked.text in ERRORS:
            raise ERRORS[asked.text][0]
        give("a piece")
        return {"text": "whole"}

    async def main():
        line = Line(answer, 10)
        jobs = [job(text) for text in ("first", *ERRORS, "last")]
        ends = [asyncio.Event() for _ in jobs]
        for asked, over in zip(jobs, ends, strict=True):
            asked.on_end = lambda event, over=over: over.set()
            line.add(asked)
        running = asyncio.create_task(line.run())
        free.set()
        for over in ends:
            await asyncio.wait_for(over.wait(), 30)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return [told(asked) for asked in jobs]

    first, *errors, last = asyncio.run(main())
    assert order == ["first", *ERRORS, "last"]
    assert first == [
        ("queue", {"position": 1}),
        ("start", {}),
        ("piece", {"text": "a piece"}),
        ("done", {"text": "whole"}),
    ]
    for found, (_, fields) in zip(errors, ERRORS.values(), strict=True):
        assert found[-1] == ("error", fields)
    places = [("queue", {"position": place}) for place in (6, 5, 4, 3, 2, 1)]
    assert last == [*places, ("start", {}), ("piece", {"text": "a piece"}), ("done", {"text": "whole"})]


def test_a_server_that_ends_tells_everybody():
    began, free = threading.Event(), threading.Event()

    def answer(asked, give):
        began.set()
        assert free.wait(30)
        return {"text": "too late"}

    async def main():
        line, jobs = Line(answer, 3), [job(), job()]
        for asked in jobs:
            line.add(asked)
        running = asyncio.create_task(line.run())
        await asyncio.to_thread(began.wait, 30)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        free.set()
        for asked in jobs:
            assert asked.is_stopped
            assert told(asked)[-1] == ("error", {"status": 503, "message": "the server is shutting down"})

    asyncio.run(main())
