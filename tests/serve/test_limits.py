"""What visitors may not do: bounds, other pages, sessions that are over."""

from __future__ import annotations

import asyncio
import io
import json
import sys

import httpx
import pytest
from PIL import Image
from serve_visitors import png
from starlette.requests import Request

from skipvision_train import cli
from skipvision_train.commands import serve as command
from skipvision_train.errors import ConfigError
from skipvision_train.serve.app import body_of
from skipvision_train.serve.limits import Limits, Rate, RefusalError
from skipvision_train.serve.sessions import Exchange, Sessions, Upload

MB = 2**20


def refused(response, status, message):
    assert response.status_code == status, response.text
    assert message in response.json()["error"]
    assert set(response.json()) == {"error"}


def bomb() -> bytes:
    """A small file of many pixels."""
    Image.new("1", (11_000, 11_000)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"", 400, "it is empty"),
        (b"no image at all", 400, "it begins with b'no image at "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", 400, "no image that can be decoded"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 400, "no image that can be decoded"),
        (png(0)[:-40], 400, "no image that can be decoded"),
        (png(0, (101, 100)), 400, "101 x 100 pixels; at most 10000"),
        (bytes(2 * MB), 413, "larger than 0.1 MiB"),
    ],
    ids=["empty", "text", "eps", "svg", "cut", "pixels", "bytes"],
)
def test_what_is_no_image_or_too_large_is_refused(someone, data, status, message):
    refused(someone.post("/api/images", content=data), status, message)
    assert someone.come()["waiting"] == []
    assert someone.upload(png(0))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_decoded(someone, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    refused(someone.post("/api/images", content=bomb()), 400, "11000 x 11000 pixels")


def test_size_is_counted_while_it_is_read(someone):
    """Without a length in the header, and with pieces that the server would have to take forever."""
    taken = []

    def endless():
        for _ in range(1000):
            taken.append(1)
            yield bytes(64 * 1024)

    try:
        refused(someone.post("/api/images", content=endless()), 413, "larger than 0.1 MiB")
    except httpx.TransportError:  # the server has hung up while we were still sending
        assert len(taken) < 1000
    assert someone.upload(png(0))


@pytest.mark.parametrize(("most", "pieces"), [(35, 4), (40, 5), (9, 1)])
def test_reading_ends_with_the_piece_that_is_too_much(most, pieces):
    taken = []

    async def receive():
        taken.append(1)
        assert len(taken) < 100, "it reads on"
        return {"type": "http.request", "body": bytes(10), "more_body": True}

    with pytest.raises(RefusalError, match="too large"):
        asyncio.run(body_of(Request({"type": "http", "headers": []}, receive), most, "too large"))
    assert len(taken) == pieces


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"plan": "mine"}, 400, "plan: unknown; there are own, dense"),
        ({"plan": "../../etc/passwd"}, 400, "plan: unknown"),
        ({"text": " \n"}, 400, "text: empty"),
        ({"text": "x" * 51}, 400, "51 characters; at most 50"),
        ({"text": "\ud800"}, 400, "Unicode"),
        ({"text": 3}, 400, "text and plan are texts"),
        ({"images": ["/etc/passwd"]}, 400, "no such image waiting"),
        ({"images": ["http://localhost/x.png"]}, 400, "no such image waiting"),
        ({"images": ["a", "b", "c"]}, 400, "images: 3; at most 2"),
        ({"images": None}, 400, "images a list"),
        ({"max_new_tokens": 10**9}, 400, 'a question is {"text", "plan", "images"}'),
    ],
)
def test_a_question_that_is_none_is_refused(someone, change, status, message):
    asked = {"text": "Which?", "plan": "own", "images": [], **change}
    refused(someone.post("/api/ask", content=json.dumps(asked)), status, message)
    assert someone.answer("Which?")["tokens"] > 0


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100, b"[]", b"\xff"])
def test_a_body_of_another_form_is_refused(someone, body):
    refused(someone.post("/api/ask", content=body), 400, "")


def test_a_long_body_is_refused(someone):
    refused(someone.post("/api/ask", content=b" " * MB), 413, "at most 50 characters")


def test_tokens_are_counted(serve):
    _, visitor = serve(tokens=10, characters=1000)
    someone = visitor()
    someone.come()
    name, fields = someone.ask("x" * 400)[-1]
    assert (name, fields["status"]) == ("error", 400)
    assert "at most" in fields["message"]


def test_images_and_turns_of_a_chat_are_counted(someone):
    names = [someone.upload(png(i)) for i in range(3)]
    refused(someone.post("/api/images", content=png(4)), 400, "at most 3 in a chat")
    refused(someone.post("/api/ask", **someone.question("Which?", [names[0], names[0]])), 400, "no such image waiting")
    someone.answer("Which?", names[:2])
    refused(someone.post("/api/ask", **someone.question("Which?", names[:1])), 400, "no such image waiting")
    assert [w["id"] for w in someone.come()["waiting"]] == names[2:]


def test_turns_are_counted(serve):
    _, visitor = serve(turns=1)
    someone = visitor()
    someone.come()
    someone.answer("Which?")
    refused(someone.post("/api/ask", **someone.question("And?")), 400, "start a new chat")
    someone.post("/api/new")
    assert someone.answer("Which?")["tokens"] > 0


def test_a_long_chat_is_refused_before_the_model_runs(serve):
    _, visitor = serve(prompt_tokens=30)
    someone = visitor()
    someone.come()
    name, fields = someone.ask("Which?", [someone.upload(png(0))])[-1]
    assert name == "error"
    assert "at most 30; start a new chat" in fields["message"]


def test_rates_are_of_each_client(serve):
    _, visitor = serve(questions_per_minute=1, uploads_per_minute=1, sessions_per_minute=2)
    someone, other, third = visitor(), visitor(), visitor()
    someone.come()
    someone.answer("Which?", [someone.upload(png(0))])
    refused(someone.post("/api/ask", **someone.question("And?")), 429, "at most 1 questions a minute; the next in ")
    refused(someone.post("/api/images", content=png(0)), 429, "uploads a minute")
    other.come()  # the same address
    refused(other.post("/api/ask", **other.question("And?")), 429, "questions")
    refused(third.get("/api/chat"), 429, "new visitors")
    assert someone.get("/api/chat").status_code == 200


def test_a_rate_ends_with_the_minute_and_forgets_clients():
    now = [0.0]
    rate = Rate(2, "questions", lambda: now[0])
    rate.take("a")
    now[0] = 30
    rate.take("a")
    rate.take("b")
    with pytest.raises(RefusalError, match="the next in 31 s"):
        rate.take("a")
    now[0] = 61
    rate.take("a")
    with pytest.raises(RefusalError, match="the next in 30 s"):
        rate.take("a")
    now[0] = 200
    rate.take("c")
    assert set(rate._events) == {"c"}


def test_a_rate_frees_a_place_after_exactly_a_minute():
    now = [0.0]
    rate = Rate(2, "questions", lambda: now[0])
    rate.take("a")
    now[0] = 30
    rate.take("a")
    now[0] = 59.5
    with pytest.raises(RefusalError, match="the next in 1 s"):
        rate.take("a")
    now[0] = 60
    rate.take("a")
    with pytest.raises(RefusalError, match="the next in 31 s"):
        rate.take("a")


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "http://127.0.0.1:1", "https://"])
def test_requests_of_other_pages_are_refused(someone, origin):
    del someone.headers["Origin"]
    headers = {} if origin is None else {"Origin": origin}
    for path in ("/api/ask", "/api/images", "/api/stop", "/api/new"):
        refused(someone.post(path, headers=headers), 403, "origin")
    refused(someone.delete("/api/images/x", headers=headers), 403, "origin")


def test_only_known_host_names_are_answered(serve):
    _, visitor = serve(names=["demo.example"])
    someone = visitor()
    for host in ("evil.example", "127.0.0.1.evil.example", "", "[::1", "demo.example.evil.example"):
        refused(someone.get("/api/chat", headers={"Host": host}), 403, "host")
    for host in ("demo.example", "Demo.Example:443", "localhost:7860", "127.0.0.1", "[::1]:80"):
        assert someone.get("/api/chat", headers={"Host": host}).status_code == 200


def test_host_names_have_no_case(serve):
    _, visitor = serve(names=["Demo.Example"])
    someone = visitor()
    someone.come()
    headers = {"Host": "DEMO.example:80", "Origin": "http://demo.EXAMPLE:80"}
    assert someone.post("/api/new", headers=headers).status_code == 200
    refused(someone.post("/api/new", headers={**headers, "Origin": "http://demo.example:81"}), 403, "origin")


def test_answers_carry_protecting_headers(someone):
    for path, status in (("/", 200), ("/page.js", 200), ("/page.css", 200), ("/api/chat", 200), ("/nothing", 404)):
        response = someone.get(path)
        assert response.status_code == status
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
    page = someone.get("/").text
    assert "<style" not in page
    assert "style=" not in page
    assert page.count("<script") == page.count('<script src="page.js"') == 1
    assert "http" not in page.replace("<!doctype html>", "")
    assert "innerHTML" not in someone.get("/page.js").text


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/page.html", "/../app.py", "/%2e%2e/app.py"])
def test_there_is_nothing_else(someone, path):
    refused(someone.get(path), 404, "not found")


def test_the_cookie_is_not_for_scripts_nor_other_sites(serve):
    _, visitor = serve()
    cookie = visitor().get("/api/chat").headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie


def test_an_unknown_session_is_said_and_a_new_one_begins(serve):
    _, visitor = serve()
    stranger = visitor(cookies={"skipvision_session": "guessed"})
    for response in (
        stranger.post("/api/images", content=png(0)),
        stranger.post("/api/ask", **stranger.question("Which?")),
        stranger.post("/api/new"),
    ):
        refused(response, 401, "your chat has expired")
    response = visitor(cookies={"skipvision_session": "guessed"}).get("/api/chat")
    assert "guessed" not in response.headers["set-cookie"]


# --- sessions ---------------------------------------------------------------------------------------------------------


def upload(size: int, name: str = "a") -> Upload:
    return Upload(name, bytes(size), b"", 1, 1)


def test_who_was_away_longest_makes_room():
    sessions = Sessions(Limits(sessions=2))
    first, second = sessions.begin(), sessions.begin()
    assert sessions.find(first.id) is first
    sessions.begin()
    assert sessions.find(second.id) is None
    assert sessions.find(first.id) is first
    assert sessions.find(None) is None


def test_who_waits_for_an_answer_does_not_leave():
    sessions = Sessions(Limits(sessions=1))
    busy = sessions.begin()
    busy.chat.job = object()
    with pytest.raises(RefusalError, match="too many visitors"):
        sessions.begin()
    busy.chat.job = None
    assert sessions.begin() is not busy
    assert len(sessions) == 1


def test_idle_visitors_are_forgotten():
    now = [0.0]
    sessions = Sessions(Limits(idle_minutes=1), lambda: now[0])
    session = sessions.begin()
    now[0] = 59
    assert sessions.find(session.id) is session
    now[0] = 118
    assert sessions.find(session.id) is session
    now[0] = 179
    assert sessions.find(session.id) is None
    assert len(sessions) == 0


def test_an_idle_visitor_whose_question_waits_is_kept():
    now = [0.0]
    sessions = Sessions(Limits(idle_minutes=1), lambda: now[0])
    busy, idle = sessions.begin(), sessions.begin()
    busy.chat.job = object()
    now[0] = 61
    sessions.begin()
    assert len(sessions) == 2
    assert sessions.find(busy.id) is busy
    assert sessions.find(idle.id) is None


def test_previews_take_memory_too():
    sessions = Sessions(Limits(memory_mb=2))
    first, second = sessions.begin(), sessions.begin()
    sessions.add(first, Upload("a", bytes(MB // 2), bytes(MB), 1, 1))
    sessions.add(second, upload(MB // 2))
    assert sessions.find(first.id) is first  # exactly full
    sessions.add(second, upload(1, "b"))
    assert sessions.find(first.id) is None


def test_memory_of_images_is_bounded():
    sessions = Sessions(Limits(memory_mb=2))
    first, second = sessions.begin(), sessions.begin()
    sessions.add(first, upload(MB))
    sessions.add(second, upload(MB))
    sessions.add(second, upload(MB, "b"))
    assert sessions.find(first.id) is None
    with pytest.raises(RefusalError, match="too many visitors"):
        sessions.add(second, upload(MB, "c"))
    assert set(second.chat.uploads) == {"a", "b"}


def test_images_of_answered_questions_do_not_wait():
    session = Sessions(Limits()).begin()
    session.chat.uploads = {"a": upload(1, "a"), "b": upload(1, "b")}
    session.chat.exchanges.append(Exchange("?", ("a",), {}))
    assert [waiting.id for waiting in session.chat.waiting] == ["b"]


# --- command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"port": 70000}, "port: 70000"),
        ({"connections": 0}, "connections: 0"),
        ({"names": ["https://demo.example"]}, "names: 'https://demo.example'"),
        ({"limits": Limits(turns=0)}, "limits.turns: 0; at least 1"),
        ({"limits": Limits(upload_mb=0.0)}, "limits.upload_mb: 0.0; above 0"),
        ({"limits": Limits(pixels=float("nan"))}, "limits.pixels: nan"),
        ({"limits": Limits(images=20)}, "limits.chat_images: 12; at least limits.images"),
        ({"limits": Limits(memory_mb=119)}, "limits.memory_mb: 119; at least limits.upload_mb x"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ConfigError) as error:
        command.check(command.Config(checkpoint="x", **change))
    assert str(error.value).startswith(message)


def test_the_least_limits_that_can_work():
    Limits(images=12, chat_images=12, memory_mb=120).check()
    Limits(*[1] * 17).check()


def test_a_missing_extra_is_one_line(monkeypatch, capsys):
    real = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else real(name))
    monkeypatch.setattr(sys, "argv", ["skipvision"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serve", "checkpoint=nowhere"])
    assert stopped.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: serve: needs uvicorn; pip install 'skipvision-train[serve]'"


def test_a_port_in_use_is_said_before_the_model_is_loaded(monkeypatch, capsys):
    with command._listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["skipvision"])
        with pytest.raises(SystemExit):
            cli.main(["serve", "checkpoint=nowhere", f"port={port}"])
    assert f"error: port: {port} at 127.0.0.1 cannot be listened at" in capsys.readouterr().err
