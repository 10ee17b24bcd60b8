"""Files of prompts: what is asked, what is written in which order, and how an interrupted run goes on."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision_train.data.records import Turn
from skipvision_train.errors import ConfigError, DataError
from skipvision_train.inference import Conversation, Reply, Sampling
from skipvision_train.inference.batch_files import (
    AnswerFile,
    Question,
    answer_file,
    plan_digest,
    read_questions,
    run_settings,
)
from skipvision_train.inference.decoding import Generated
from skipvision_train.plans import dense, skip_ffn, vskip

SHORT = Sampling(max_new_tokens=4)
SETTINGS = {"plan": "p", "temperature": 0.0}


@pytest.fixture
def folder(tmp_path, pictures):
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.fixture
def entries(questions):
    one, two, none = questions
    return [
        {"id": "a", "image": "0.png", "prompt": one},
        {"id": 7, "prompt": none},
        {"images": ["1.png", "2.png"], "prompt": two},
        {"id": "d", "messages": [{"role": "user", "content": none}]},
    ]


def write_prompts(folder: Path, entries: list) -> Path:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "prompts.jsonl"


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(assistant, source: Path, output: Path, settings=SETTINGS, system=None, **options):
    with AnswerFile(output, settings) as answers:
        return answer_file(assistant, read_questions(source, system), answers, SHORT, **options)


# --- what is asked -------------------------------------------------------------------------------------------------


def test_lines_become_conversations(folder):
    source = write_prompts(
        folder,
        [
            {"prompt": "Plain", "images": ["0.png", "1.png"], "task": "t"},
            "",
            {
                "id": "chat",
                "image": "0.png",
                "system": "Be brief.",
                "messages": [
                    {"role": "user", "content": "What is <image>?"},
                    {"role": "assistant", "content": "A set."},
                    {
                        "role": "user",
                        "content": [{"type": "image", "path": "1.png"}, {"type": "text", "text": "?"}],
                    },
                ],
            },
            {"image": "0.png", "messages": [{"role": "user", "content": "No marker"}]},
        ],
    )
    plain, chat, unmarked = read_questions(source, system="Default.")
    assert (plain.line, plain.id, plain.prompt.task) == (1, 1, "t")
    assert plain.prompt.turns == (Turn("system", "Default."), Turn("user", "<image>\n<image>\nPlain"))
    assert plain.prompt.images == (folder / "0.png", folder / "1.png")
    assert (chat.line, chat.id) == (3, "chat")
    assert [turn.role for turn in chat.prompt.turns] == ["system", "user", "assistant", "user"]
    assert chat.prompt.turns[0].text == "Be brief."
    assert chat.prompt.turns[-1].text == "<image>\n?"
    assert chat.prompt.images == (folder / "0.png", folder / "1.png")
    assert unmarked.prompt.turns[-1].text == "<image>\nNo marker"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ('{"prompt": NaN}', "NaN is no JSON value"),
        ("[1]", "a JSON object is expected, found a list"),
        ({"id": 1.5, "prompt": "p"}, "'id': a string or an integer is expected, found 1.5"),
        ({"id": "first", "prompt": "p"}, "'id': 'first' is another line's id, too"),
        ({}, "'prompt': a text is expected, found None"),
        ({"prompt": "p", "messages": []}, "both are given"),
        ({"messages": {}}, "'messages': a list of messages is expected, found an empty object"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 0 has the role 'bot'"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "message 0, part 0: an image is expected here"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "turns are assistant; they must be"),
        ({"image": "0.png", "messages": [{"role": "system", "content": "x"}]}, "0 <image> markers, but 1 images more"),
        (
            {"images": ["0.png", "1.png"], "messages": [{"role": "user", "content": "<image>"}]},
            "1 <image> markers, but 1 images more",
        ),
        ({"system": "s", "messages": [{"role": "system", "content": "x"}]}, "'system': 'messages' begins with"),
        ({"prompt": "p", "image": "http://x/y.png"}, "images are not downloaded"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "turn 0: half a surrogate pair"),
    ],
)
def test_a_line_that_is_no_prompt_has_a_reason(folder, line, reason):
    _, question = read_questions(write_prompts(folder, [{"id": "first", "prompt": "p"}, line]))
    assert question.prompt is None
    assert question.line == 2
    assert reason in question.error
    assert "\n" not in question.error


@pytest.mark.parametrize("ids", [(7, 7), (7, "7"), ("x", "x")])
def test_two_lines_with_one_id(folder, ids):
    first, second = read_questions(write_prompts(folder, [{"id": i, "prompt": "p"} for i in ids]))
    assert first.error is None
    assert "is another line's id, too" in second.error


# --- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_the_prompts_alone_in_their_order(assistant, folder, entries, questions, batch_size):
    done = run(assistant, write_prompts(folder, entries), folder / "out" / "a.jsonl", batch_size=batch_size)
    one, two, none = questions
    asked = [
        Conversation().ask(one, [folder / "0.png"]),
        Conversation().ask(none),
        Conversation().ask(two, [folder / "1.png", folder / "2.png"]),
        Conversation().ask(none),
    ]
    alone = [assistant.reply(conversation, SHORT) for conversation in asked]
    lines = read_lines(folder / "out" / "a.jsonl")
    assert [line["id"] for line in lines] == ["a", 7, 3, "d"]
    assert [line["answer"] for line in lines] == [reply.text for reply in alone]
    assert [line["tokens"] for line in lines] == [reply.tokens for reply in alone]
    assert [line["prompt_tokens"] for line in lines] == [reply.prompt for reply in alone]
    assert (done.answered, done.kept, done.errors) == (4, 0, 0)
    assert done.tokens == sum(reply.tokens for reply in alone)


def test_bad_prompts_become_lines_with_the_reason(ours, folder):
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    source = write_prompts(
        folder,
        [
            {"id": "good", "prompt": "Why?"},
            "{",
            {"id": "gone", "image": "none.png", "prompt": "Why?"},
            {"id": "bad", "image": "broken.png", "prompt": "Why?"},
            {"id": "good", "prompt": "Why?"},
            {"id": "last", "image": "0.png", "prompt": "Why?"},
        ],
    )
    done = run(ours, source, folder / "a.jsonl", batch_size=4)
    lines = read_lines(folder / "a.jsonl")
    assert [(line["id"], "error" in line) for line in lines] == [
        ("good", False),
        (None, True),
        ("gone", True),
        ("bad", True),
        ("good", True),
        ("last", False),
    ]
    assert [line.get("line") for line in lines] == [None, 2, 3, 4, 5, None]
    assert "none.png" in lines[2]["error"]
    assert "broken.png" in lines[3]["error"]
    assert (done.answered, done.errors) == (2, 4)
    again = run(ours, source, folder / "a.jsonl", batch_size=4)
    assert (again.answered, again.kept, again.errors) == (0, 6, 4)
    assert read_lines(folder / "a.jsonl") == lines


def test_what_the_model_cannot_take_fails_alone(ours, folder, monkeypatch):
    """Rows of more than 60 positions do not fit, nor two rows together."""
    generate = ours._generate

    def small(inputs, *rest) -> Generated:
        if inputs["input_ids"].numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return generate(inputs, *rest)

    monkeypatch.setattr(ours, "_generate", small)
    prompts = [{"id": i, "prompt": "Why?" * (20 if i == 1 else 1)} for i in range(4)]
    done = run(ours, write_prompts(folder, prompts), folder / "a.jsonl", batch_size=4)
    lines = read_lines(folder / "a.jsonl")
    assert ["error" in line for line in lines] == [False, True, False, False]
    assert lines[1]["error"] == "too little memory: CUDA out of memory. Tried to allocate 2 GiB"
    assert (done.answered, done.errors) == (3, 1)


def test_stopping_at_an_error_keeps_what_stands_before_it(ours, folder):
    prompts = [{"id": "a", "prompt": "Why?"}, {"id": "b", "image": "none.png", "prompt": "Why?"}, {"prompt": "And?"}]
    source = write_prompts(folder, prompts)
    with pytest.raises(DataError, match=r"input: line 2: .*none\.png"):
        run(ours, source, folder / "a.jsonl", stops=True)
    assert [line["id"] for line in read_lines(folder / "a.jsonl")] == ["a"]
    (folder / "none.png").write_bytes((folder / "0.png").read_bytes())
    assert run(ours, source, folder / "a.jsonl", stops=True).answered == 2
    assert [line["id"] for line in read_lines(folder / "a.jsonl")] == ["a", "b", 3]


def test_every_task_runs_under_its_plan(ours, folder):
    plans = {"x": vskip([0, 1, 2]).bind(3), "y": dense().bind(3)}
    tasks = ["x", None, "y", "x"]
    prompts = [{"image": "0.png", "prompt": f"Why {i}?", **({"task": t} if t else {})} for i, t in enumerate(tasks)]
    before = ours.plan
    run(ours, write_prompts(folder, prompts), folder / "a.jsonl", plan_of=lambda task: plans.get(task or "", before))
    assert ours.plan == before
    expected = []
    for i, task in enumerate(tasks):
        with ours.under(plans.get(task or "", before)):
            expected.append(ours.reply(Conversation().ask(f"Why {i}?", [folder / "0.png"]), SHORT).text)
    assert [line["answer"] for line in read_lines(folder / "a.jsonl")] == expected


def test_details_are_in_every_line(ours, folder):
    run(ours, write_prompts(folder, [{"prompt": "Why?"}]), folder / "a.jsonl", details=True)
    (line,) = read_lines(folder / "a.jsonl")
    assert line["first_token_ms"] > 0
    assert line["kv_bytes"] > 0


# --- going on ------------------------------------------------------------------------------------------------------


class Echo:
    """Answers a prompt with its text, after so many prompts not at all."""

    plan = dense().bind(1)

    def __init__(self, breaks_after: int | None = None) -> None:
        self.left = breaks_after
        self.asked: list[str] = []

    def under(self, plan):
        return torch.no_grad()

    def replies(self, conversations, sampling):
        texts = [conversation.turns[-1].text for conversation in conversations]
        if self.left is not None and (left := self.left - len(texts)) < 0:
            raise KeyboardInterrupt
        if self.left is not None:
            self.left = left
        self.asked += texts
        return [Reply(text, True, 1, {"text": 1}, 1.0, None, 0.0) for text in texts]


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    with AnswerFile(tmp_path / "a.jsonl", SETTINGS) as answers:
        answers.write({"id": 1})
        assert read_lines(tmp_path / "a.jsonl") == [{"id": 1}]


def test_long_prompts_run_first(tmp_path):
    assistant = Echo()
    run(
        assistant,
        write_prompts(tmp_path, [{"prompt": "q" * n} for n in (2, 9, 5, 7)]),
        tmp_path / "a.jsonl",
        batch_size=2,
    )
    assert [len(text) for text in assistant.asked] == [9, 7, 5, 2]
    assert [len(line["answer"]) for line in read_lines(tmp_path / "a.jsonl")] == [2, 9, 5, 7]


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25),
    batch_size=st.integers(1, 4),
    breaks=st.integers(0, 25),
    cut=st.integers(0, 60),
)
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path_factory, lengths, batch_size, breaks, cut):
    """Killed after so many prompts, and the file cut as a full disk or a lost machine would."""
    folder = tmp_path_factory.mktemp("interrupted")
    prompts = ["{" if n == 13 else {"id": f"ü{i}", "prompt": f"{i} " * n} for i, n in enumerate(lengths)]
    source, whole, broken = write_prompts(folder, prompts), folder / "whole.jsonl", folder / "broken.jsonl"
    run(Echo(), source, whole, batch_size=batch_size)
    with suppress(KeyboardInterrupt):
        run(Echo(breaks), source, broken, batch_size=batch_size)
    written = broken.read_bytes()
    assert whole.read_bytes().startswith(written)
    broken.write_bytes(written[: max(0, len(written) - cut)])
    kept = broken.read_bytes().count(b"\n")
    second = Echo()
    done = run(second, source, broken, batch_size=batch_size)
    assert broken.read_bytes() == whole.read_bytes()
    assert done.kept == kept
    assert done.errors == lengths.count(13)
    left = [f"{i} " * n for i, n in enumerate(lengths) if n != 13 and i >= kept]
    assert sorted(second.asked) == sorted(left)


def test_prompts_added_later_are_answered_alone(tmp_path):
    first = [{"id": i, "prompt": f"q{i}"} for i in range(3)]
    run(Echo(), write_prompts(tmp_path, first), tmp_path / "a.jsonl")
    later = Echo()
    run(later, write_prompts(tmp_path, [{"id": "new", "prompt": "q"}, *first]), tmp_path / "a.jsonl")
    assert later.asked == ["q"]
    assert [line["id"] for line in read_lines(tmp_path / "a.jsonl")] == [0, 1, 2, "new"]


def test_answers_under_other_settings_are_not_mixed(tmp_path):
    source = write_prompts(tmp_path, [{"prompt": "q"}])
    run(Echo(), source, tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match=r"output: .*a\.jsonl was begun with temperature 0\.0, now it is 0\.5"):
        run(Echo(), source, tmp_path / "a.jsonl", settings={**SETTINGS, "temperature": 0.5})


def test_settings_that_an_earlier_version_did_not_know_are_others(tmp_path):
    source = write_prompts(tmp_path, [{"prompt": "q"}])
    run(Echo(), source, tmp_path / "a.jsonl")
    run(Echo(), source, tmp_path / "a.jsonl", settings={**SETTINGS, "top_k": None})  # as it was without
    with pytest.raises(ConfigError, match="was begun with top_k None, now it is 5"):
        run(Echo(), source, tmp_path / "a.jsonl", settings={**SETTINGS, "top_k": 5})


def test_settings_tell_plans_and_sampling_apart():
    def found(plan, sampling=SHORT):
        return run_settings("m", Path("p.jsonl"), sampling, None, plan=plan_digest([plan]))

    assert found(skip_ffn().bind(3)) == found(skip_ffn().bind(3))
    assert found(skip_ffn().bind(3)) == found(replace(skip_ffn().bind(3), name="renamed"))
    assert found(skip_ffn().bind(3)) != found(vskip([1]).bind(3))
    assert found(dense().bind(3)) != found(dense().bind(3), Sampling(4, temperature=1.0))


@pytest.mark.parametrize("content", ["mine\n", '{"id": 1}', '{"answer": "x"}\n'])
def test_a_file_of_somebody_else_stays(tmp_path, content):
    output = tmp_path / "a.jsonl"
    output.write_text(content)
    with pytest.raises(ConfigError, match="was not begun by this command"):
        run(Echo(), write_prompts(tmp_path, [{"prompt": "q"}]), output)
    assert output.read_text() == content


def test_a_line_that_is_no_answer_is_named(tmp_path):
    source = write_prompts(tmp_path, [{"prompt": "q"}])
    run(Echo(), source, tmp_path / "a.jsonl")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("stray\n")
    with pytest.raises(DataError, match=r"a\.jsonl: line 2 is none of this command's: not JSON"):
        run(Echo(), source, tmp_path / "a.jsonl")


def test_output_that_cannot_be_written(tmp_path):
    source = write_prompts(tmp_path, [{"prompt": "q"}])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a folder"):
        run(Echo(), source, tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        run(Echo(), source, tmp_path / "file" / "a.jsonl")


def test_a_question_is_as_long_as_what_it_shows(folder):
    (text,) = read_questions(write_prompts(folder, [{"prompt": "q" * 100}]))
    (shown,) = read_questions(write_prompts(folder, [{"prompt": "q", "image": "0.png"}]))
    assert Question(1, None, None, "bad").length < text.length < shown.length
