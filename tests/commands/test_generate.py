"""``skipvision generate`` on a saved model of ours and of transformers': one prompt, a file, a chat, two plans."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace

import pytest
from PIL import Image
from tiny_vlms import make_family
from watched import make_ours

from skipvision_train import cli
from skipvision_train.analysis.flops import sequence_flops
from skipvision_train.inference import Assistant, Conversation, Reply, Sampling
from skipvision_train.inference.terminal import Chat, Screen, _table, compare, figures
from skipvision_train.plans import TokenKind, dense, skip_ffn, vskip

LENGTH = "max_new_tokens=6"
SHORT = Sampling(max_new_tokens=6)
PLAIN = (
    "{% for m in messages %}{% for p in m.content %}{{ '<|image_pad|>' if p.type == 'image' else p.text }} {% endfor %}"
    "{% endfor %}"
)
"""A chat template of words for the models of transformers."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Saved models of transformers, pictures, a plan."""
    folder = tmp_path_factory.mktemp("generate")
    for name in ("llava", "qwen2_5_vl"):
        family = make_family(name)
        family.model.save_pretrained(folder / name)
        family.processor.save_pretrained(folder / name)
    for i in range(3):
        Image.effect_mandelbrot((24, 20 + i), (-2, -1.5, 1 + i, 1.5), 30).convert("RGB").save(folder / f"{i}.png")
    vskip([0, 1, 2]).bind(3).save(folder / "plan.json")
    return folder


@pytest.fixture
def folder(shared, config_factory):
    """Our model beside them, made once."""
    if not (shared / "ours").exists():
        config = config_factory(skip_plan=skip_ffn().bind(3).to_dict())
        model, processor = make_ours(config)
        model.save_pretrained(shared / "ours")
        processor.save_pretrained(shared / "ours")
    return shared


@pytest.fixture
def ours(folder):
    return Assistant.open(folder / "ours", device="cpu")


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Run the command in this process, in the folder: status, stdout, stderr without log lines."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["skipvision"])

    def run(*arguments: str, stdin: str = "", model: str = "ours") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stopped:
            cli.main(["generate", f"checkpoint={model}", "device=cpu", LENGTH, *arguments])
        out = capsys.readouterr()
        return stopped.value.code, out.out, out.err

    return run


def last(text: str) -> str:
    return text.strip().splitlines()[-1]


# --- one prompt ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["null", "true"])
@pytest.mark.parametrize(
    ("model", "words"), [("ours", "Why?"), ("llava", "w1 w2"), ("qwen2_5_vl", "<image> w1 <image> w2")]
)
def test_one_prompt_with_images(command, folder, model, words, stream):
    status, out, _ = command(f"prompt='{words}'", "image=[0.png,1.png]", f"stream={stream}", model=model)
    expected = Assistant.open(folder / model, device="cpu").ask(words, [folder / "0.png", folder / "1.png"], SHORT)
    assert status == 0
    assert out.strip() == expected
    assert out.endswith("\n")


def test_system_plan_and_sampling_reach_the_model(command, folder, ours):
    asked = Conversation.begin("Be brief.").ask("Why?", [folder / "0.png"])
    drawn = Sampling(6, temperature=5.0, top_p=0.9, top_k=50, seed=3)
    with ours.under(vskip([0, 1, 2])):
        expected = ours.reply(asked, drawn).text
    options = ("temperature=5.0", "top_p=0.9", "top_k=50", "seed=3")
    _, out, _ = command("prompt='Why?'", "image=[0.png]", "system='Be brief.'", "plan=plan.json", *options)
    assert out == expected + "\n"


def test_figures_go_to_stderr(command, folder, ours):
    reply = ours.reply(Conversation().ask("Why?", [folder / "0.png"]), SHORT)
    counts = {TokenKind[name.upper()]: number for name, number in reply.prompt.items()}
    flops = sequence_flops(ours.model.config.text_config, counts, ours.own_plan).total
    _, out, err = command("prompt='Why?'", "image=[0.png]", "stats=true")
    assert out == reply.text + "\n"
    line = last(err)
    assert line.startswith(f"prompt {sum(reply.prompt.values())} tokens ({reply.prompt['text']} text, ")
    assert f"prefill {flops / 1e9:.2f} GFLOPs; {reply.tokens} generated" in line
    assert f"KV cache {reply.kv_bytes / 2**20:.2f} MiB" in line


def test_two_plans_side_by_side(command, folder, ours):
    asked = Conversation().ask("Why?", [folder / "0.png"])
    replies = {}
    for plan in (ours.own_plan, dense()):
        with ours.under(plan):
            replies[plan.name] = (ours.reply(asked, SHORT), ours.prefill_flops(ours.reply(asked, SHORT).prompt))
    status, out, _ = command("prompt='Why?'", "image=[0.png]", "compare=true")
    assert status == 0
    own, whole = replies.values()
    assert out.startswith(f"{ours.own_plan.name}:\n{own[0].text}\n\ndense:\n{whole[0].text}\n\n")
    rows = {line[:24].strip(): line[24:].split() for line in out.splitlines()}
    assert rows["prompt, skipped tokens"] == [str(own[0].prompt["skipped"])] * 2 + ["1.00"]
    assert rows["generated tokens"][:2] == [str(own[0].tokens), str(whole[0].tokens)]
    assert rows["prefill GFLOPs"][2] == f"{own[1] / whole[1]:.2f}"
    assert own[1] < whole[1]
    assert rows["KV cache MiB at the end"][2] == f"{own[0].kv_bytes / whole[0].kv_bytes:.2f}"


def test_one_slow_moment_does_not_decide_between_two_plans(ours, folder, monkeypatch):
    """The first turn warms up; of the others the median counts. Only the last answers are shown."""
    asked = Conversation().ask("Why?", [folder / "0.png"])
    times = iter([900, 800, 10, 20, 700, 22, 12, 600])  # plan and dense, turn by turn
    lengths, reply = [], ours.reply

    def timed(conversation, sampling):
        lengths.append((ours.plan.name, sampling.max_new_tokens))
        return replace(reply(conversation, sampling), first_token_ms=next(times))

    monkeypatch.setattr(ours, "reply", timed)
    rows = [line.split() for line in compare(ours, asked, SHORT)]
    assert ["first", "token", "ms", "12.0", "22.0", "0.55"] in rows
    names = [ours.own_plan.name, "dense"]
    assert lengths == [(name, length) for length in (2, 2, 2, SHORT.max_new_tokens) for name in names]


# --- a file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "words"), [("ours", "Why?"), ("llava", "w1 w2"), ("qwen2_5_vl", "w1 w2")])
def test_a_file_of_prompts(command, folder, tmp_path, model, words):
    texts = ["", "<image>", "<image> w3 <image>"]  # Qwen's own code takes images side by side for one
    prompts = [{"id": f"q{i}", "images": ["0.png", "1.png"][:i], "prompt": f"{texts[i]} {words}"} for i in range(3)]
    (folder / "some.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    arguments = ("input=some.jsonl", f"output={tmp_path / 'a.jsonl'}", "batch_size=2")
    status, out, err = command(*arguments, model=model)
    assert (status, out) == (0, "")
    assert "%|" not in err  # no bars in a log
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assistant = Assistant.open(folder / model, device="cpu")
    images = [folder / "0.png", folder / "1.png"]
    expected = [assistant.ask(f"{texts[i]} {words}", images[:i], SHORT) for i in range(3)]
    assert [line["id"] for line in lines] == ["q0", "q1", "q2"]
    assert [line["answer"] for line in lines] == expected
    assert command(*arguments, model=model)[0] == 0
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 3


def test_prompts_without_an_answer_are_counted(command, folder, tmp_path):
    (folder / "bad.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": 3}\n')
    for _ in range(2):  # the second run finds all lines there, and the error still
        status, _, err = command("input=bad.jsonl", f"output={tmp_path / 'a.jsonl'}")
        assert status == 1
        assert last(err).startswith("error: input: 1 of 2 prompts have no answer; the lines with 'error' in ")
    status, _, err = command("input=bad.jsonl", f"output={tmp_path / 'b.jsonl'}", "on_error=stop")
    assert status == 1
    assert last(err) == "error: input: line 2: 'prompt': a text is expected, found 3"
    assert len((tmp_path / "b.jsonl").read_text().splitlines()) == 1


def test_a_pipe_of_prompts_is_refused(command, tmp_path):
    """It is read twice: counted, then answered."""
    reading, writing = os.pipe()
    os.write(writing, b'{"prompt": "Why?"}\n')
    os.close(writing)
    status, out, err = command(f"input=/dev/fd/{reading}", f"output={tmp_path / 'a.jsonl'}")
    os.close(reading)
    assert (status, out) == (1, "")
    assert last(err) == f"error: input: /dev/fd/{reading}: is no regular file; prompts are read twice"


# --- a chat --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [True, False])
def test_figures_of_a_reply(finished):
    reply = Reply("a", finished, 3, {"text": 5, "skipped": 2}, 12.4, 1.25, 3 * 2**19)
    assert figures(reply, 2.5e9) == (
        f"prompt 7 tokens (5 text, 2 skipped), prefill 2.50 GFLOPs; 3 generated{'' if finished else ', cut'}, "
        "the first after 12 ms, then 1.2 ms each; KV cache 1.50 MiB"
    )


def test_a_ratio_needs_two_numbers():
    rows = [
        ("both", [3.0, 2.0], ".1f"),
        ("own", [1.0, None], ".1f"),
        ("dense", [None, 1.0], ".1f"),
        ("none", [1.0, 0.0], ".0f"),
    ]
    assert [line.split()[1:] for line in _table(["own", "dense"], rows)] == [
        *(["dense", "ratio"], ["3.0", "2.0", "1.50"], ["1.0", "-", "-"], ["-", "1.0", "-"], ["1", "0", "-"]),
    ]


def test_a_chat_from_a_pipe(command, folder, ours):
    first = Conversation.begin("Be brief.").ask("What is this?", [folder / "0.png"])
    one = ours.reply(first, SHORT).text
    second = first.answered(one).ask("And <image> or <image>?", [folder / "1.png", folder / "2.png"])
    with ours.under(vskip([0, 1, 2])):
        two = ours.reply(second, SHORT).text
    with ours.under(dense()):
        three = ours.reply(Conversation.begin("Be brief.").ask("Hello"), SHORT).text
    lines = [
        "What is this?",
        "",
        "/image 1.png",
        "/image '2.png'",
        "/plan plan.json",
        "And <image> or <image>?",
        "/image 0.png",
        "/reset",
        "/plan dense",
        "Hello",
        "/plan own",
        "/quit",
        "never asked",
    ]
    status, out, err = command("chat=true", "image=[0.png]", "system='Be brief.'", stdin="\n".join(lines))
    assert status == 0
    assert out == f"{one}\n{two}\n{three}\n"
    assert [line for line in err.splitlines() if line.startswith("plan: ")] == [
        "plan: vskip",
        "plan: dense",
        f"plan: {ours.own_plan.name}",
    ]
    assert [line for line in err.splitlines() if line.endswith("with the next question")] == [
        "1 image with the next question",
        "2 images with the next question",
        "1 image with the next question",
    ]


def test_what_goes_wrong_in_a_chat_leaves_it_as_it_was(command, ours):
    lines = ["Hello", "/image none.png", "/plan none.json", "/jump", "<image>?", "And?"]
    status, out, err = command("chat=true", stdin="\n".join(lines) + "\n")
    first = Conversation().ask("Hello")
    one = ours.reply(first, SHORT).text
    assert out == f"{one}\n{ours.reply(first.answered(one).ask('And?'), SHORT).text}\n"
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    for message, part in zip(errors, ("none.png", "none.json", "/jump is no command", "1 <image> mark"), strict=False):
        assert part in message
    assert errors[4] == "error: chat: 4 lines went wrong"
    assert status == 1


@pytest.mark.parametrize("model", ["ours", "qwen2_5_vl"])
def test_an_answer_that_spells_the_marker_is_no_image(folder, model, monkeypatch):
    assistant = Assistant.open(folder / model, device="cpu")
    assistant.processor.chat_template = PLAIN
    stored, reply = [], assistant.reply

    def spelling(conversation, sampling):
        stored.append(conversation)
        return replace(reply(conversation, sampling), text="an <image> w3")

    monkeypatch.setattr(assistant, "reply", spelling)
    chat = Chat(assistant, Screen(io.StringIO(), io.StringIO()), SHORT)
    chat.run(["w1", "w2"])
    assert (chat.failed, len(stored)) == (0, 2)
    assert [turn.text for turn in stored[1].turns] == ["w1", "an < image> w3", "w2"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_pieces_and_no_control_characters(ours, monkeypatch):
    reply = ours.reply(Conversation().ask("Why?"), SHORT)
    out = Terminal()
    Screen(out, io.StringIO(), streams=True).show(ours, Conversation().ask("Why?"), SHORT)
    safe = "".join("\N{REPLACEMENT CHARACTER}" if c < " " and c not in "\n\t" else c for c in reply.text)
    assert out.getvalue().strip() == safe.strip()
    out = Terminal()
    Screen(out, io.StringIO())._write("a\x1b[2J\tb\x9b\n")
    assert out.getvalue() == "a\N{REPLACEMENT CHARACTER}[2J\tb\N{REPLACEMENT CHARACTER}\n"


class Interrupting(io.StringIO):
    """Ctrl-C when the first piece has been written."""

    def write(self, text: str) -> int:
        if text.strip() and not self.getvalue():
            super().write(text)
            raise KeyboardInterrupt
        return super().write(text)


def test_an_interrupted_answer_ends_alone(ours):
    chat = Chat(ours, Screen(Interrupting(), io.StringIO(), True, keeps_partial=True), Sampling(max_new_tokens=300))
    chat.run(["Why?"])
    _, answer = chat.conversation.turns
    assert answer.text
    assert len(answer.text) < len(ours.reply(Conversation().ask("Why?"), Sampling(max_new_tokens=300)).text)
    with pytest.raises(KeyboardInterrupt):
        Screen(Interrupting(), io.StringIO(), True).show(ours, Conversation().ask("Why?"), SHORT)


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "prompt: needs a value; give prompt=..., input=FILE.jsonl output=FILE.jsonl, or chat=true"),
        (("prompt=a", "chat=true"), "chat: True with prompt; give one of prompt, input and chat"),
        (("prompt=''",), "prompt: empty, and no image; ask something"),
        (("prompt='\udcff'",), "prompt: no text at character 0"),
        (("input=some.jsonl",), "output: needs a value beside input"),
        (("prompt=a", "output=b.jsonl"), "output: 'b.jsonl' goes with input, not with prompt"),
        (("chat=true", "compare=true"), "compare: True goes with prompt, not with chat"),
        (("input=a", "output=b", "image=[c.png]"), "image: ['c.png'] with input"),
        (("input=a", "output=b", "stream=true"), "stream: true with input"),
        (("prompt=a", "compare=true", "stream=true"), "stream: true with compare"),
        (("prompt=a", "batch_size=0"), "batch_size: 0; at least 1"),
        (("prompt=a", "on_error=skip"), "on_error: 'skip' is unknown; use continue or stop"),
        (("prompt=a", "max_new_tokens=0"), "max_new_tokens: 0; at least 1"),
        (("prompt=a", "temperature=-1"), "temperature: -1.0; 0 for the likeliest token"),
        (("prompt=a", "top_p=0"), "top_p: 0.0; above 0"),
        (("prompt='<image> a'",), "prompt: 1 <image> markers, but 0 images"),
        (("prompt=a", "image=[none.png]"), "none.png"),
        (("input=none.jsonl", "output=b"), "input: none.jsonl: cannot be read: No such file or directory"),
        (("input=empty.jsonl", "output=b"), "input: empty.jsonl: holds no prompts"),
        (("prompt=a", "compare=true", "plan=dense"), "compare: the plan 'dense' leaves nothing out"),
        (("prompt=a", "plan=none.json"), "none.json"),
        (("prompt=a", "checkpoint=nowhere"), "checkpoint: nowhere is no model directory"),
        (("prompt=a", "checkpoint=run"), "checkpoint: run is no model directory: it has no config.json; run/model has"),
        (("prompt=a", "checkpoint=text"), "checkpoint: text holds a model of text (llama), which sees no images"),
        (("prompt=a", "prompt=b"), "prompt: given 2 times"),
        (("prompt=a", "image=0.png"), "image: '0.png' is no list; write 'image=[0.png]'"),
        (("prompt=a", "device=abacus"), "device: 'abacus' is no device"),
        (("prompt=a", "tempreature=1"), "tempreature: no such field; did you mean 'temperature'?"),
    ],
)
def test_a_mistake_is_one_line(command, folder, arguments, message):
    (folder / "empty.jsonl").write_text("\n")
    for place, kind in (("run/model", "skip_vision"), ("text", "llama")):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    status, out, err = command(*arguments)
    assert (status, out) == (1, "")
    assert last(err).startswith("error: ")
    assert message in last(err)
    assert not (folder / "b").exists()
