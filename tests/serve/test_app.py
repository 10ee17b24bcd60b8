"""The web demo over real connections: answers, plans, history, isolation, stop, errors."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from serve_visitors import events, png
from starlette.requests import Request
from tiny_vlms import make_family

from skipvision_train.errors import ConfigError, DataError, PlanError
from skipvision_train.inference import Assistant, Conversation, Sampling
from skipvision_train.plans import dense, victor, vskip
from skipvision_train.serve.answering import Answering, choices, decoded, without_spellings
from skipvision_train.serve.app import Server
from skipvision_train.serve.limits import Limits, RefusalError
from skipvision_train.serve.queue import Job

SHORT = Sampling(max_new_tokens=6)


def test_the_stream_is_the_reply(serve, assistant):
    expected = assistant.reply(Conversation().ask("Which colour?", [decoded(png(0))]), SHORT)
    _, visitor = serve()
    someone = visitor()
    someone.come()
    found = someone.ask("Which colour?", [someone.upload(png(0))])
    names = [name for name, _ in found]
    assert names[:2] == ["queue", "start"]
    assert set(names[2:-1]) == {"piece"}
    assert "".join(fields["text"] for name, fields in found if name == "piece").strip() == expected.text
    done = found[-1][1]
    assert found[-1][0] == "done"
    assert done["text"] == expected.text != ""
    assert done["prompt"] == expected.prompt
    assert done["tokens"] == expected.tokens
    assert done["kv_bytes"] == expected.kv_bytes
    assert done["prefill_flops"] == assistant.prefill_flops(expected.prompt)
    assert done["first_token_ms"] > 0
    assert done["waited_ms"] >= 0


def test_plans_are_exchanged_between_questions(serve, assistant, tmp_path):
    vskip([0, 1, 2]).bind(3).save(tmp_path / "deep.json")
    _, visitor = serve(plans=[str(tmp_path / "deep.json")])
    someone = visitor()
    assert [plan["name"] for plan in someone.come()["plans"]] == ["own", "dense", "deep"]
    plans = {"own": assistant.own_plan, "dense": dense(), "deep": vskip([0, 1, 2])}
    found = {}
    for name in ("own", "deep", "dense", "own"):
        with assistant.under(plans[name].bind(3)):
            expected = assistant.reply(Conversation().ask("Which colour?", [decoded(png(0))]), SHORT)
            flops = assistant.prefill_flops(expected.prompt)
        answer = someone.answer("Which colour?", [someone.upload(png(0))], name)
        assert (answer["text"], answer["plan"], answer["prefill_flops"]) == (expected.text, name, flops)
        found[name] = answer["text"], flops
        someone.post("/api/new")
    assert len(set(found.values())) == 3, "the plans must not answer alike, or nothing is shown"


def test_a_chat_remembers_what_was_said_and_shown(serve, assistant):
    first = Conversation.begin("Be brief.").ask("Which?", [decoded(png(0))])
    second = first.answered(assistant.reply(first, SHORT).text).ask("And this?", [decoded(png(1))])
    expected = assistant.reply(second, SHORT).text
    _, visitor = serve(system="Be brief.")
    someone = visitor()
    someone.come()
    someone.answer("Which?", [someone.upload(png(0))])
    assert someone.answer("And this?", [someone.upload(png(1))])["text"] == expected
    shown = someone.come()
    assert [exchange["text"] for exchange in shown["exchanges"]] == ["Which?", "And this?"]
    assert shown["exchanges"][1]["answer"]["text"] == expected
    assert [someone.get(f"/api/images/{e['images'][0]}").status_code for e in shown["exchanges"]] == [200, 200]
    begun = someone.post("/api/new").json()
    assert begun["exchanges"] == begun["waiting"] == []
    assert someone.get(f"/api/images/{shown['exchanges'][0]['images'][0]}").status_code == 404


def test_twenty_visitors_at_once_get_each_their_own_answer(serve, assistant):
    questions = [(f"{i * i}{'?' * i} Which{i}", png(i)) for i in range(20)]
    alone = [assistant.ask(text, [decoded(image)], Sampling(max_new_tokens=24)) for text, image in questions]
    assert len(set(alone)) > 15, "answers must differ, or a mix-up would not be seen"
    _, visitor = serve(uploads=20, new_tokens=24)
    visitors = [visitor() for _ in questions]
    together = threading.Barrier(20)

    def talk(who, text, image):
        who.come()
        name = who.upload(image)
        together.wait(30)
        return who.answer(text, [name])["text"], who.come()["exchanges"]

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(talk, visitors, *zip(*questions, strict=True)))
    assert [text for text, _ in found] == alone
    assert [[e["text"] for e in kept] for _, kept in found] == [[text] for text, _ in questions]
    assert len({who.cookies["skipvision_session"] for who in visitors}) == 20


def test_a_visitor_cannot_see_or_use_anothers_images(serve):
    _, visitor = serve()
    owner, other = visitor(), visitor()
    owner.come()
    other.come()
    name = owner.upload(png(0))
    assert other.get(f"/api/images/{name}").status_code == 404
    assert other.delete(f"/api/images/{name}").status_code == 400
    assert other.post("/api/ask", **other.question("Which?", [name])).status_code == 400
    assert visitor().get(f"/api/images/{name}").status_code == 401
    assert owner.get(f"/api/images/{name}").headers["content-type"] == "image/jpeg"
    assert other.come()["waiting"] == []
    assert [w["id"] for w in owner.come()["waiting"]] == [name]
    assert owner.delete(f"/api/images/{name}").status_code == 200
    assert owner.come()["waiting"] == []


def test_stop_ends_the_answer_and_keeps_what_came(serve, assistant, request):
    """The model is held behind its twelfth token until the server has the wish to stop."""
    _, visitor = serve(new_tokens=64)
    someone = visitor()
    someone.come()
    whole = someone.answer("Which?", [someone.upload(png(0))])
    assert whole["tokens"] > 14
    someone.post("/api/new")
    wished = hold_after(assistant, 12, request)
    with someone.stream("POST", "/api/ask", **someone.question("Which?", [someone.upload(png(0))])) as response:
        found = []
        for event in events(response.iter_lines()):
            found.append(event)
            if event[0] == "piece" and not wished.is_set():
                assert visitor_like(someone, visitor).post("/api/stop").status_code == 200
                wished.set()
    name, fields = found[-1]
    assert name == "done"
    assert fields["stopped"]
    assert not fields["finished"]
    assert 1 <= fields["tokens"] < whole["tokens"]
    assert whole["text"].startswith(fields["text"].rstrip("\N{REPLACEMENT CHARACTER}")), "cut inside of a character"
    assert someone.come()["exchanges"][0]["answer"]["text"] == fields["text"]
    assert someone.answer("And?")["tokens"] > 0


def test_a_closed_page_ends_the_generation(serve, assistant):
    answering, visitor = serve(new_tokens=400)
    someone, next_one = visitor(), visitor()
    someone.come()
    next_one.come()
    seen = []
    job = {}
    counting = assistant.model.register_forward_pre_hook(lambda *_: seen.append(1))
    with someone.stream("POST", "/api/ask", **someone.question("Which?", [someone.upload(png(0))])) as response:
        for name, _ in events(response.iter_lines()):
            if name == "piece":
                (session,) = [s for s in answering.server.sessions._all.values() if s.chat.job is not None]
                job["it"] = session.chat.job
                break
    assert next_one.answer("Another?")["tokens"] > 0
    assert job["it"].is_stopped
    counting.remove()
    assert 0 < len(seen) < 800, "both questions answered to the end would take 800 steps"
    assert session.chat.job is None


def test_a_waiting_question_can_be_stopped_and_positions_move(serve):
    answering, visitor = serve()
    answering.is_open.clear()
    crowd = [visitor() for _ in range(3)]
    for who in crowd:
        who.come()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(crowd[0].ask, "0")
        assert answering.began.acquire(timeout=30)
        second = pool.submit(crowd[1].ask, "1")
        wait_for_line(answering, 1)
        third = pool.submit(crowd[2].ask, "2")
        wait_for_line(answering, 2)
        visitor_like(crowd[1], visitor).post("/api/stop")
        assert second.result(30)[-1] == ("error", {"status": 499, "message": "stopped before the answer began"})
        answering.is_open.set()
        assert first.result(30)[-1][0] == "done"
        found = third.result(30)
    assert [fields["position"] for name, fields in found if name == "queue"] == [2, 1]
    assert found[-1][0] == "done"
    assert crowd[1].come()["exchanges"] == []


def test_a_full_queue_and_a_second_question_are_refused(serve):
    answering, visitor = serve(queue=1)
    answering.is_open.clear()
    crowd = [visitor() for _ in range(3)]
    for who in crowd:
        who.come()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(crowd[0].ask, "0")
        assert answering.began.acquire(timeout=30)
        waiting = pool.submit(crowd[1].ask, "1")
        wait_for_line(answering, 1)
        full = crowd[2].post("/api/ask", **crowd[2].question("2"))
        again = visitor_like(crowd[0], visitor).post("/api/ask", **crowd[0].question("0"))
        answering.is_open.set()
        assert running.result(30)[-1][0] == waiting.result(30)[-1][0] == "done"
    assert (full.status_code, full.json()["error"]) == (503, "1 questions are waiting already; try again in a minute")
    assert again.status_code == 409
    assert crowd[2].answer("2")["tokens"] > 0


@pytest.mark.parametrize("error", [RuntimeError("secret"), SystemExit(3), DataError("template: no"), MemoryError()])
def test_an_error_of_the_model_reaches_its_visitor_alone(serve, error):
    answering, visitor = serve()
    someone, other = visitor(), visitor()
    someone.come()
    other.come()
    image = someone.upload(png(0))
    answering.errors.append(error)
    name, fields = someone.ask("Which?", [image])[-1]
    assert name == "error"
    assert fields["status"] == (400 if isinstance(error, DataError) else 500)
    assert "secret" not in fields["message"]
    assert other.answer("Which?")["tokens"] > 0
    assert [w["id"] for w in someone.come()["waiting"]] == [image], "the question can be asked again"
    assert someone.answer("Which?", [image])["tokens"] > 0


def test_a_new_chat_ends_the_answer_of_the_old_one(serve):
    answering, visitor = serve()
    answering.is_open.clear()
    someone = visitor()
    someone.come()
    with ThreadPoolExecutor(1) as pool:
        old = pool.submit(someone.ask, "old")
        assert answering.began.acquire(timeout=30)
        twin = visitor_like(someone, visitor)
        assert twin.post("/api/new").status_code == 200
        answering.is_open.set()
        old.result(30)
    assert twin.come()["exchanges"] == []
    assert twin.answer("new")["tokens"] > 0


@pytest.mark.parametrize("text", ["<image>", "a <ima<image>ge> b", "<image><image>"])
def test_image_markers_in_a_text_show_nothing_and_shift_nothing(serve, assistant, text):
    harmless = text.replace("<image>", "< image>")
    expected = assistant.ask(harmless, [decoded(png(0))], SHORT)
    _, visitor = serve()
    someone = visitor()
    someone.come()
    answer = someone.answer(text, [someone.upload(png(0))])
    assert answer["text"] == expected
    assert someone.answer(text)["prompt"]["retained"] == answer["prompt"]["retained"]
    assert someone.come()["exchanges"][0]["text"] == text


def test_image_markers_in_an_answer_show_nothing(assistant):
    """Of the model itself: it is given back to it with the next question."""
    expected = assistant.reply(Conversation().ask("Which?").answered("an < image>").ask("And?"), SHORT)
    answering = Answering(assistant, choices(assistant, []), SHORT, Limits())
    found = answering(Job("own", [("Which?", (), "an <image>")], "And?", ()), lambda piece: None)
    assert (found["text"], found["prompt"]) == (expected.text, expected.prompt)


def test_prompt_and_answer_fit_the_models_positions(assistant):
    positions = assistant.model.config.text_config.max_position_embeddings
    answering = Answering(assistant, choices(assistant, []), Sampling(positions - 20), Limits(prompt_tokens=10**6))
    with pytest.raises(RefusalError, match=r"^chat: \d+ tokens .*; at most 20;"):
        answering(Job("own", (), "Which of the colours?", ()), lambda piece: None)


@pytest.fixture
def server():
    """Without a model or connections."""
    return Server(SimpleNamespace(plans={"own": dense().bind(3)}), Limits(), "tiny")


def test_an_upload_into_a_chat_that_has_ended_is_refused(server):
    async def main():
        session = server.sessions.begin()

        async def receive():
            server.begin_anew(session)
            return {"type": "http.request", "body": png(0), "more_body": False}

        with pytest.raises(RefusalError, match="a new chat has begun meanwhile"):
            await server.upload(Request({"type": "http", "headers": []}, receive), session)
        assert not session.chat.uploads

    asyncio.run(main())


def test_a_question_without_an_answer_was_never_asked(server):
    async def main():
        session, request = server.sessions.begin(), Request({"type": "http", "headers": []})
        asked = {"text": "Which?", "plan": "own", "images": []}
        for event in (("done", {"text": ""}), ("error", {"status": 500}), ("done", {"text": "red"})):
            server.ask(request, session, asked).end(event)
            assert session.chat.job is None
        assert [(e.text, e.answer) for e in session.chat.exchanges] == [("Which?", {"text": "red"})]

    asyncio.run(main())


def test_special_tokens_in_a_text_stay_text(assistant):
    ours = Answering(assistant, choices(assistant, []), SHORT, Limits())
    special = assistant.processor.tokenizer.convert_ids_to_tokens(assistant.model.config.image_token_id)
    asked = Conversation().ask(ours.plain(f"a{special}b"), [decoded(png(0))])
    ids = assistant.encode([asked])["input_ids"][0].tolist()
    plainly = assistant.encode([Conversation().ask("ab", [decoded(png(0))])])["input_ids"][0].tolist()
    token = assistant.model.config.image_token_id
    assert ids.count(token) == plainly.count(token)

    family = make_family("qwen2_5_vl")
    foreign = Assistant(family.model.eval(), family.processor)
    theirs = Answering(foreign, choices(foreign, []), SHORT, Limits(prompt_tokens=400))
    for special in foreign.processor.tokenizer.all_special_tokens:
        assert special not in theirs.plain(f"w1 {special} w2")
    assert "<image>" not in theirs.plain("<image>")


def test_spellings_that_overlap_leave_nothing():
    assert without_spellings("abc", ["ab", "bc"]) == "a b c"
    assert without_spellings("nothing", ["<x>"]) == "nothing"


def test_plan_files_are_checked_at_the_start(assistant, tmp_path):
    vskip([0]).bind(3).save(tmp_path / "own.json")
    with pytest.raises(ConfigError, match="there is a plan named 'own' already"):
        choices(assistant, [str(tmp_path / "own.json")])
    vskip([0]).bind(7).save(tmp_path / "deep.json")
    with pytest.raises(PlanError):
        choices(assistant, [str(tmp_path / "deep.json")])
    victor(1, 4).save(tmp_path / "victor.json")
    with pytest.raises(ConfigError, match="registers: 0, but"):  # of the right depth, but the model has none
        choices(assistant, [str(tmp_path / "victor.json")])
    with pytest.raises(PlanError, match="no such plan file"):
        choices(assistant, [str(tmp_path / "none.json")])
    assert assistant.plan == assistant.own_plan


def hold_after(assistant, steps, request):
    """The model waits behind ``steps`` forwards for the event that is returned."""
    count, wished = [0], threading.Event()

    def hold(*_):
        count[0] += 1
        assert count[0] <= steps or wished.wait(30)

    request.addfinalizer(assistant.model.register_forward_pre_hook(hold).remove)
    return wished


def visitor_like(someone, visitor):
    """The same visitor over another connection."""
    return visitor(cookies={"skipvision_session": someone.cookies["skipvision_session"]})


def wait_for_line(answering, length):
    """Until so many questions wait."""
    ready = threading.Event()
    for _ in range(3000):
        if len(answering.server.line._waiting) == length:
            return
        ready.wait(0.01)
    raise AssertionError("the question did not arrive")
