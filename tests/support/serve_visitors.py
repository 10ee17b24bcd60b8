"""Visitors of the web demo, and a server in a thread of its own for them."""

from __future__ import annotations

import io
import json
import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn
from PIL import Image


def png(number: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """A picture that no other number has."""
    image = Image.effect_mandelbrot(size, (-2, -1.5, 1 + number / 3, 1.5), 30).convert("RGB")
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


class Visitor(httpx.Client):
    """A browser: its cookies, and the page's origin in every request."""

    def __init__(self, address: str, **more):
        super().__init__(base_url=address, headers={"Origin": address}, timeout=60, **more)

    def come(self) -> dict:
        response = self.get("/api/chat")
        assert response.status_code == 200, response.text
        return response.json()

    def upload(self, data: bytes) -> str:
        response = self.post("/api/images", content=data)
        assert response.status_code == 200, response.text
        return response.json()["id"]

    def question(self, text: str, images=(), plan: str = "own") -> dict:
        return {"json": {"text": text, "plan": plan, "images": list(images)}}

    def ask(self, text: str, images=(), plan: str = "own") -> list[tuple[str, dict]]:
        """All events."""
        response = self.post("/api/ask", **self.question(text, images, plan))
        assert response.status_code == 200, response.text
        return list(events(response.iter_lines()))

    def answer(self, text: str, images=(), plan: str = "own") -> dict:
        name, fields = self.ask(text, images, plan)[-1]
        assert name == "done", fields
        return fields


def events(lines):
    lines = iter(lines)
    for line in lines:
        name, data = line.removeprefix("event: "), next(lines).removeprefix("data: ")
        assert next(lines) == ""
        yield name, json.loads(data)


@contextmanager
def running(app):
    config = uvicorn.Config(app, port=0, log_config=None, log_level="warning", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
