"""The requests of the page: images, questions with streamed answers, stop, new chat."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from skipvision_train.data.images import image_facts
from skipvision_train.data.records import ImageRef
from skipvision_train.errors import DataError
from skipvision_train.serve.answering import Answering, decoded
from skipvision_train.serve.guard import Guard
from skipvision_train.serve.limits import Limits, Rate, RefusalError
from skipvision_train.serve.queue import Event, Job, Line
from skipvision_train.serve.sessions import Chat, Exchange, Session, Sessions, Upload

log = logging.getLogger(__name__)

COOKIE = "skipvision_session"
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
PREVIEW_SIDE = 320
"""Of the small picture that the page shows, pixels."""

LISTENS_EVERY = 0.5
"""Seconds between looks whether a visitor who waits for an answer is still there."""

T = TypeVar("T")


class Server:
    """The state behind the routes, all of it in the event loop.

    Args:
        answering: runs the model.
        limits: of visitors.
        title: what the page calls the model.
    """

    def __init__(self, answering: Answering, limits: Limits, title: str) -> None:
        self.answering, self.limits, self.title = answering, limits, title
        self.sessions = Sessions(limits)
        self.line = Line(answering, limits.queue)
        self.questions = Rate(limits.questions_per_minute, "questions")
        self.uploads = Rate(limits.uploads_per_minute, "uploads")
        self.beginnings = Rate(limits.sessions_per_minute, "new visitors from one address")
        self.uploading = 0

    def session_of(self, request: Request) -> Session:
        """The visitor.

        Raises:
            RefusalError: 401, unknown or forgotten.
        """
        session = self.sessions.find(request.cookies.get(COOKIE))
        if session is None:
            raise RefusalError(401, "your chat has expired on the server; a new one begins")
        return session

    def state(self, session: Session) -> dict[str, Any]:
        """What the page shows when it is opened."""
        plans, chat, limits = self.answering.plans, session.chat, self.limits
        return {
            "title": self.title,
            "plans": [{"name": name, "rules": plan.name, "is_dense": plan.is_dense} for name, plan in plans.items()],
            "limits": {"upload_mb": limits.upload_mb, "images": limits.images, "characters": limits.characters},
            "exchanges": [{"text": e.text, "images": e.images, "answer": e.answer} for e in chat.exchanges],
            "waiting": [upload.facts() for upload in chat.waiting],
        }

    async def upload(self, request: Request, session: Session) -> Upload:
        """Read, check and keep an image.

        Raises:
            RefusalError: too large, too slow, no image, or too many at a time.
        """
        self.uploads.take(client_of(request))
        if self.uploading >= self.limits.uploads:
            raise RefusalError(503, f"{self.limits.uploads} uploads are running already; try again in a moment")
        self.uploading += 1
        chat = session.chat
        try:
            what = f"image: larger than {self.limits.upload_mb:g} MiB, which is the most that is read"
            data = await within(body_of(request, self.limits.upload_bytes, what), self.limits.upload_seconds)
            made = await asyncio.get_running_loop().run_in_executor(None, open_upload, data, self.limits.pixels)
        finally:
            self.uploading -= 1
        if session.chat is not chat:
            raise RefusalError(409, "image: a new chat has begun meanwhile; upload it again")
        self.sessions.add(session, made)
        return made

    def ask(self, request: Request, session: Session, asked: Any) -> Job:
        """Put a question into the line.

        Raises:
            RefusalError: something is wrong with it, or it comes too early.
        """
        text, plan, names = question_fields(asked)
        chat = session.chat
        if chat.job is not None:
            raise RefusalError(409, "the last question is still being answered; stop it, or wait")
        if plan not in self.answering.plans:
            raise RefusalError(400, f"plan: unknown; there are {', '.join(self.answering.plans)}")
        if not text.strip():
            raise RefusalError(400, "text: empty; ask something")
        if len(text) > self.limits.characters:
            raise RefusalError(400, f"text: {len(text)} characters; at most {self.limits.characters}")
        if len(names) > self.limits.images:
            raise RefusalError(400, f"images: {len(names)}; at most {self.limits.images} in a question")
        if len(chat.exchanges) >= self.limits.turns:
            raise RefusalError(400, f"chat: {self.limits.turns} questions, more it cannot have; start a new chat")
        images = chat.chosen(names)
        self.questions.take(client_of(request))
        data = {name: upload.data for name, upload in chat.uploads.items()}
        said = [(e.text, [data[name] for name in e.images], e.answer["text"]) for e in chat.exchanges]
        job = Job(plan, said, text, [upload.data for upload in images])

        def note(event: Event) -> None:
            chat.job = None
            if event[0] == "done" and event[1]["text"]:  # without an answer the question was never asked
                chat.exchanges.append(Exchange(text, tuple(names), event[1]))

        job.on_end = note
        self.line.add(job)
        chat.job = job
        return job

    def begin_anew(self, session: Session) -> None:
        """Forget a visitor's chat."""
        if session.chat.job is not None:
            self.line.stop(session.chat.job)
        session.chat = Chat()


class EventStream(StreamingResponse):
    """A job's events as server-sent events. However it ends, the job ends with it."""

    def __init__(self, request: Request, line: Line, job: Job) -> None:
        self._request, self._line, self._job = request, line, job
        super().__init__(self._events(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._line.stop(self._job)

    async def _events(self) -> AsyncIterator[str]:
        name = ""
        while name not in ("done", "error"):
            try:
                name, fields = await asyncio.wait_for(self._job.events.get(), LISTENS_EVERY)
            except asyncio.TimeoutError:
                if await self._request.is_disconnected():
                    return
                continue
            yield f"event: {name}\ndata: {json.dumps(fields)}\n\n"


def make_app(answering: Answering, limits: Limits, title: str, names: list[str] | None = None) -> FastAPI:
    """The application.

    Args:
        answering: runs the model.
        limits: of visitors.
        title: what the page calls the model.
        names: host names of this server, see ``guard.Guard``.
    """
    server = Server(answering, limits, title)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        line = asyncio.create_task(server.line.run())
        yield
        line.cancel()
        await asyncio.gather(line, return_exceptions=True)

    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
        middleware=[Middleware(Guard, names=names or [])],
    )
    app.state.server = server
    app.add_exception_handler(RefusalError, _refused)
    app.add_exception_handler(HTTPException, _refused_by_framework)
    app.add_exception_handler(Exception, _failed)
    _add_page(app)
    _add_chat(app, server)
    return app


def _add_page(app: FastAPI) -> None:
    for path, (file, kind) in PAGE.items():
        app.add_route(path, _static((Path(__file__).parent / file).read_bytes(), kind), methods=["GET"])


def _static(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def page(_: Request) -> Response:
        return Response(content, media_type=kind)

    return page


def _add_chat(app: FastAPI, server: Server) -> None:
    @app.get("/api/chat")
    async def state(request: Request) -> Response:
        session = server.sessions.find(request.cookies.get(COOKIE))
        is_new = session is None
        if session is None:
            server.beginnings.take(client_of(request))
            session = server.sessions.begin()
        response = JSONResponse(server.state(session))
        if is_new:
            secure = request.url.scheme == "https"
            response.set_cookie(COOKIE, session.id, httponly=True, samesite="strict", secure=secure)
        return response

    @app.post("/api/images")
    async def upload(request: Request) -> Response:
        return JSONResponse((await server.upload(request, server.session_of(request))).facts())

    @app.get("/api/images/{name}")
    async def preview(request: Request, name: str) -> Response:
        found = server.session_of(request).chat.uploads.get(name)
        if found is None:
            raise RefusalError(404, "image: this chat has none of that name")
        return Response(found.preview, media_type="image/jpeg")

    @app.delete("/api/images/{name}")
    async def take_away(request: Request, name: str) -> Response:
        chat = server.session_of(request).chat
        if chat.job is not None:
            raise RefusalError(409, "image: the question is being answered")
        chat.chosen([name])
        del chat.uploads[name]
        return JSONResponse({})

    @app.post("/api/ask")
    async def ask(request: Request) -> Response:
        session = server.session_of(request)
        most = 16 * server.limits.characters + 4096  # every character as a JSON escape of up to 12 bytes, and the rest
        body = body_of(request, most, f"text: at most {server.limits.characters} characters")
        data = await within(body, server.limits.upload_seconds)
        return EventStream(request, server.line, server.ask(request, session, parsed(data)))

    @app.post("/api/stop")
    async def stop(request: Request) -> Response:
        job = server.session_of(request).chat.job
        if job is not None:
            server.line.stop(job)
        return JSONResponse({})

    @app.post("/api/new")
    async def new(request: Request) -> Response:
        session = server.session_of(request)
        server.begin_anew(session)
        return JSONResponse(server.state(session))


def client_of(request: Request) -> str:
    """The address that limits per client count."""
    return request.client.host if request.client is not None else ""


async def body_of(request: Request, most: int, refusal: str) -> bytes:
    """The request's body, of which never more than ``most`` bytes and a piece are held.

    Raises:
        RefusalError: 413, it is longer; 400, it was cut off.
    """
    data = bytearray()
    try:
        async for piece in request.stream():
            if len(data) + len(piece) > most:
                raise RefusalError(413, refusal)
            data += piece
    except ClientDisconnect as error:
        raise RefusalError(400, "the request was cut off") from error
    return bytes(data)


async def within(work: Awaitable[T], seconds: float) -> T:
    """What ``work`` gives.

    Raises:
        RefusalError: 408, it takes longer.
    """
    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError as error:
        raise RefusalError(408, f"the request took longer than {seconds:g} s") from error


def parsed(data: bytes) -> Any:
    """JSON.

    Raises:
        RefusalError: 400, it is none.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RefusalError(400, "the request is no JSON") from error


def question_fields(asked: Any) -> tuple[str, str, list[str]]:
    """Text, plan and images of a question.

    Raises:
        RefusalError: 400, another form.
    """
    if not isinstance(asked, dict) or set(asked) != {"text", "plan", "images"}:
        raise RefusalError(400, 'a question is {"text", "plan", "images"}')
    text, plan, names = asked["text"], asked["plan"], asked["images"]
    is_right = isinstance(text, str) and isinstance(plan, str) and isinstance(names, list)
    if not is_right or not all(isinstance(name, str) for name in names):
        raise RefusalError(400, "text and plan are texts, images a list of them")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RefusalError(400, "text: half a character; it must be Unicode")
    return text, plan, names


def open_upload(data: bytes, most: int) -> Upload:
    """Check an image by decoding it.

    Args:
        data: the file.
        most: pixels.

    Raises:
        RefusalError: 400, no image, a damaged one, or too many pixels.
    """
    ref = ImageRef(Path("image"), data=data)
    try:
        facts = image_facts(ref, "upload")
        if facts.width * facts.height > most:
            raise RefusalError(400, f"image: {facts.width} x {facts.height} pixels; at most {most} in all")
        image = decoded(data)
    except DataError as error:
        raise RefusalError(400, f"image: {str(error).removeprefix('image (record upload): ')}") from error
    width, height = image.size
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    image.save(file := BytesIO(), "JPEG", quality=85)
    return Upload(secrets.token_urlsafe(16), data, file.getvalue(), width, height)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusalError)
    return JSONResponse({"error": error.message}, error.status)


async def _refused_by_framework(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": str(error.detail).lower()}, error.status_code)


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": "the server failed; its log says why"}, 500)
