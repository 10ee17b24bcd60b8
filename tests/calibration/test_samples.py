"""Drawing, prompts from files, and samples of our model and of transformers' models."""

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers
from packaging import version
from tiny_vlms import make_family
from tokenizers.processors import TemplateProcessing

from skipvision_train.adapters.chat import chat_messages
from skipvision_train.calibration.samples import (
    draw,
    prompt_samples,
    read_jsonl,
    record_samples,
    refuse_single_samples,
    subtask,
)
from skipvision_train.data.records import ImageRef, Record, Turn
from skipvision_train.errors import ConfigError, DataError

# --- drawing -------------------------------------------------------------------------------------------------------


def items_of(**sizes):
    """``a0 a1 ... b0 ...``, one name per item, tasks interleaved as they may stand in a file."""
    items = [f"{task}{i}" for task, size in sizes.items() for i in range(size)]
    return sorted(items, key=lambda item: (item[1:], item[0]))


def first_letter(item):
    return item[0]


def test_a_seed_draws_the_same_in_every_process():
    items = items_of(a=6, b=4, c=9)
    assert draw(items, 7, 0, first_letter) == ["c8", "a1", "b1", "c4", "a0", "b3", "c1"]


@pytest.mark.parametrize("count", range(1, 16))
def test_shares_differ_by_one_and_a_smaller_draw_begins_a_larger_one(count):
    items = items_of(a=6, b=5, c=9)
    drawn = draw(items, count, 3, first_letter)
    shares = Counter(map(first_letter, drawn))
    assert len(set(drawn)) == count
    assert set(drawn) <= set(items)
    assert max(shares[task] for task in "abc") - min(shares[task] for task in "abc") <= 1
    assert draw(items, 16, 3, first_letter)[:count] == drawn


def test_what_is_drawn_of_a_task_does_not_depend_on_the_others():
    alone = draw(items_of(a=6), 6, 1, first_letter)
    mixed = [item for item in draw(items_of(a=6, b=8), 12, 1, first_letter) if item[0] == "a"]
    assert mixed == alone == draw(items_of(a=6, b=2, c=3), 6, 1, first_letter, task="a")


def test_seeds_draw_differently():
    items = items_of(a=50)
    assert len({tuple(draw(items, 5, seed, first_letter)) for seed in range(5)}) == 5


def test_the_items_are_left_as_they_were():
    items = items_of(a=6, b=4)
    draw(items, 4, 0, first_letter)
    draw(items, 4, 0, first_letter, stratified=False)
    assert items == items_of(a=6, b=4)


def test_without_strata_a_task_counts_by_its_size():
    items = items_of(a=90, b=10)
    drawn = draw(items, 80, 0, first_letter, stratified=False)
    assert len(set(drawn)) == 80
    assert sum(item[0] == "a" for item in drawn) >= 70  # at least that many: only ten others exist
    assert draw(items, 30, 0, first_letter, stratified=False) == drawn[:30]


@pytest.mark.parametrize(
    ("count", "task", "stratified", "message"),
    [
        (0, None, True, "samples: 0; at least 1"),
        (11, None, False, r"samples: 11, but only 10 can be drawn; ask for fewer, or give more data"),
        (11, None, True, r"samples: 11, but only 10 can be drawn \(a 7, b 3\)"),
        (5, "b", True, r"samples: 5, but only 3 can be drawn \(b 3\)"),
        (8, None, True, r"8 over 2 tasks means 4 of 'b', which has 3 \(a 7, b 3\); ask for 7 at most"),
        (1, "c", True, "task: nothing can be drawn from 'c'; there are a, b"),
    ],
)
def test_too_few_items_are_refused_with_both_numbers(count, task, stratified, message):
    with pytest.raises(ConfigError, match=message):
        draw(items_of(a=7, b=3), count, 0, first_letter, task, stratified)


def test_the_largest_draw_that_the_message_names_works():
    assert len(draw(items_of(a=7, b=3), 7, 0, first_letter)) == 7


def test_data_without_tasks_says_so():
    with pytest.raises(ConfigError, match="no tasks in the data"):
        draw(["x", "y"], 1, 0, lambda item: "", task="a")


def test_many_tasks_are_not_all_listed():
    items = [f"{i:03}" for i in range(100)]
    with pytest.raises(ConfigError, match=r"000, .*, 011 and 88 more$"):
        draw(items, 1, 0, lambda item: item, task="a")


def test_one_sample_of_a_task_has_no_variance():
    with pytest.raises(ConfigError, match="one of 'b', 'd', and one has no variance; draw 2 of every task"):
        refuse_single_samples("aabccd")
    refuse_single_samples("aacc")


# --- prompts from a file -------------------------------------------------------------------------------------------


def write_lines(tmp_path, *entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (tmp_path / "quiz.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "quiz.jsonl"


def test_lines_become_records(tmp_path):
    path = write_lines(
        tmp_path,
        "\ufeff" + json.dumps({"image": "x/a.png", "prompt": "Which?", "answer": "red", "task": "colour"}),
        "",
        {"id": 12, "images": ["a.png", "/b.png"], "prompt": "Is <image> like <image>?"},
    )
    first, second = read_jsonl(path)
    assert first == Record(
        "1",
        "quiz",
        (ImageRef(tmp_path / "x/a.png"),),
        (Turn("user", "<image>\nWhich?"), Turn("assistant", "red")),
        "colour",
    )
    assert (second.id, second.task, subtask(second)) == ("12", None, "")
    assert [str(image) for image in second.images] == [str(tmp_path / "a.png"), "/b.png"]
    assert second.turns == (Turn("user", "Is <image> like <image>?"), Turn("assistant", ""))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON object is expected"),
        ({"image": "a.png"}, "'prompt': a text is expected, found None"),
        ({"image": "a.png", "prompt": "  "}, "'prompt'"),
        ({"prompt": "p"}, "'image', 'images': both are missing or empty"),
        ({"prompt": "p", "images": []}, "'image', 'images': both are missing or empty"),
        ({"prompt": "p", "image": "a.png", "images": ["a.png"]}, "both are given"),
        ({"prompt": "p", "images": ["a.png", 3]}, "'images': a path or a list of paths"),
        ({"prompt": "<image> <image>", "image": "a.png"}, "'prompt': 2 <image> markers, but 1 images"),
        ({"prompt": "p", "image": "a.png", "answer": ""}, "'answer'"),
        ({"prompt": "p", "image": "a.png", "answer": ["x"]}, "'answer'"),
        ({"prompt": "p", "image": "a.png", "task": 3}, "'task'"),
        ({"prompt": "p", "image": "a.png", "id": 1.5}, "'id': a string or an integer"),
        ({"prompt": "p", "image": "a.png", "id": "first"}, "'id': 'first' is another line's id"),
        ('{"prompt": "\\ud800", "image": "a.png"}', "'prompt': half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path, line, message):
    path = write_lines(tmp_path, {"id": "first", "image": "a.png", "prompt": "p"}, line)
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}: line 2: ")
    assert message in str(caught.value)


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no prompts"):
        read_jsonl(write_lines(tmp_path, ""))
    with pytest.raises(DataError, match=r"prompts: .*absent\.jsonl: cannot be read: No such file"):
        read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_jsonl(tmp_path)


# --- our own model -------------------------------------------------------------------------------------------------


def predicted(sample, tokenizer):
    """What stands behind the positions that are read."""
    positions = sample.read[0].nonzero()[:, 0]
    return tokenizer.decode(sample.inputs["input_ids"][0, positions + 1])


@torch.no_grad()
def test_the_next_token_is_read_behind_the_prompt(own_model, own_processor, record):
    asked = record("Which colour?", "red", "And how many?", "two", task="colour")
    (sample,) = record_samples(own_model, own_processor, [asked])
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": asked.images[0].path}, {"type": "text", "text": "Which colour?"}],
        },
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "And how many?"},
    ]
    expected = own_processor.apply_chat_template(messages)
    assert (sample.id, sample.task) == ("quiz/7", "colour")
    assert sample.inputs.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(sample.inputs[key], value)
    assert sample.read.nonzero().tolist() == [[0, expected["input_ids"].shape[1] - 1]]
    assert sample.read.shape == sample.inputs["input_ids"].shape
    own_model(**sample.inputs)


@torch.no_grad()
def test_the_last_answer_is_teacher_forced(own_model, own_processor, record):
    asked = record("Which colour?", "red", "And how many?", "two")
    (short,) = record_samples(own_model, own_processor, [asked])
    (long,) = record_samples(own_model, own_processor, [asked], "answer")
    assert predicted(long, own_processor.tokenizer) == "two<|eot_id|>"
    assert "labels" not in long.inputs
    # The first of its positions is the one that the prompt alone is read at.
    here, there = (own_model(**sample.inputs).logits[sample.read] for sample in (short, long))
    torch.testing.assert_close(here[0], there[0], atol=1e-5, rtol=1e-5)
    assert len(here) == 1
    assert len(there) == 4


def test_pixels_come_in_the_precision_of_the_model(own_model, own_processor, record):
    (sample,) = record_samples(own_model.to(torch.bfloat16), own_processor, [record("Which?", "red")])
    assert sample.inputs["pixel_values"].dtype == torch.bfloat16
    assert sample.inputs["input_ids"].dtype == torch.int64


def test_what_cannot_be_measured_is_named(own_model, own_processor, record, tmp_path):
    asked = record("Which?", "red")
    text_only = replace(asked, images=(), turns=(Turn("user", "Which?"), Turn("assistant", "red")))
    for run in (record_samples, prompt_samples):
        with pytest.raises(DataError, match="record 7 of quiz: shows no image"):
            run(own_model, own_processor, [text_only])
        with pytest.raises(ConfigError, match="positions: 'all' is unknown; use next or answer"):
            run(own_model, own_processor, [asked], "all")
    with pytest.raises(DataError, match="record 7 of quiz: turn 1: the answer is empty"):
        record_samples(own_model, own_processor, [record("Which?", "")], "answer")
    twice = replace(asked, turns=(*asked.turns[:1], Turn("user", "More?"), Turn("assistant", "no")))
    with pytest.raises(DataError, match="record 7 of quiz: turns are user, user"):
        record_samples(own_model, own_processor, [twice])
    whole = asked.images[0].path.read_bytes()
    asked.images[0].path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"7\.png \(record 7\): no image that can be decoded"):
        record_samples(own_model, own_processor, [asked])
    asked.images[0].path.unlink()
    with pytest.raises(DataError, match=r"7\.png \(record 7\): no such image"):
        record_samples(own_model, own_processor, [asked])


# --- models of transformers ----------------------------------------------------------------------------------------

CHAT = (
    "{% for message in messages %}{{ message.role }} {% for part in message.content %}{% if part.type == 'image' %}"
    "MARK {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}w9{% endif %}"
)
FAMILIES = ("llava", "llava_next", "qwen2_5_vl")


def chatting(name, template=CHAT):
    """A family whose processor has a chat template, and an end token."""
    family = make_family(name)
    family.processor.chat_template = template.replace("MARK", " ".join(family.marker.replace("><", "> <").split()))
    family.processor.tokenizer.eos_token = "w29"
    return family


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_template_writes_the_prompt(name, record):
    family, asked = chatting(name), record("w1 w2", "w3 w4", task="colour")
    (sample,) = prompt_samples(family.model, family.processor, [asked])
    ids = sample.inputs["input_ids"][0]
    words = family.processor.tokenizer.convert_ids_to_tokens(ids[ids != family.image_token_id])
    assert [word for word in words if "vision" not in word] == ["<unk>", "w1", "w2", "w9"]  # <unk>: the role
    assert (ids == family.image_token_id).sum() > 1
    assert (sample.id, sample.task) == ("quiz/7", "colour")
    assert sample.read.nonzero().tolist() == [[0, len(ids) - 1]]
    assert torch.isfinite(family.model(**sample.inputs).logits).all()


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_follows_the_prompt_of_any_model(name, record):
    family, asked = chatting(name), record("w1 w2", "w3 w4")
    start = ("w28", family.processor.tokenizer.convert_tokens_to_ids("w28"))  # a tokenizer that begins every text
    backend = family.processor.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="w28 $A", special_tokens=[start])
    (short,) = prompt_samples(family.model, family.processor, [asked])
    (long,) = prompt_samples(family.model, family.processor, [asked], "answer")
    assert predicted(long, family.processor.tokenizer).split() == ["w3", "w4", "w29"]
    here, there = (family.model(**sample.inputs).logits[sample.read] for sample in (short, long))
    torch.testing.assert_close(here[0], there[0], atol=1e-5, rtol=1e-5)
    assert len(there) == 3
    assert short.inputs["input_ids"][0, 0] == start[1]


def test_without_a_chat_template_an_image_is_its_token(record, picture):
    family = make_family("llava")
    asked = replace(record("w1", "w3"), turns=(Turn("user", "w1 <image> w2 <image>"), Turn("assistant", "w3")))
    asked = replace(asked, images=(*asked.images, ImageRef(picture("other.png"))))
    (sample,) = prompt_samples(family.model, family.processor, [asked])
    image = [family.image_token_id] * 4
    words = family.processor.tokenizer.convert_tokens_to_ids(["w1", "w2"])
    assert sample.inputs["input_ids"].tolist() == [[words[0], *image, words[1], *image]]
    assert sample.inputs["pixel_values"].shape == (2, 3, 8, 8)


def test_messages_keep_the_places_of_images():
    turns = [Turn("system", "be brief"), Turn("user", "a <image>\nb"), Turn("assistant", "c"), Turn("user", "<image> ")]
    text = {"be brief", "a", "b", "c"}
    assert [
        (message["role"], [part.get("text", part.get("image")) for part in message["content"]])
        for message in chat_messages(turns, ["first", "second"])
    ] == [
        ("system", ["be brief"]),
        ("user", ["a", "first", "b"]),
        ("assistant", ["c"]),
        ("user", ["second"]),
    ]
    parts = [part for message in chat_messages(turns, [1, 2]) for part in message["content"]]
    assert {part["text"] for part in parts if part["type"] == "text"} == text


def test_models_and_processors_that_cannot_be_asked_are_refused(record):
    asked = record("w1 w2", "w3")
    deaf = chatting("llava", CHAT.replace("MARK", ""))
    # Before 5.23 the processor of transformers lets a lost image pass, and the model refuses it.
    refused = pytest.raises(DataError, match=r"record 7 of quiz: LlavaProcessor cannot write it: .* 0 <image> tokens")
    with refused if version.parse(transformers.__version__) >= version.parse("5.23") else nullcontext():
        prompt_samples(deaf.model, deaf.processor, [asked])
    endless = make_family("llava")
    with pytest.raises(ConfigError, match="the tokenizer names none"):
        prompt_samples(endless.model, endless.processor, [asked], "answer")
    family = chatting("llava")
    with pytest.raises(DataError, match="record 7 of quiz: 'answer' is empty"):
        prompt_samples(family.model, family.processor, [record("w1 w2", "")], "answer")
    with pytest.raises(ConfigError, match=r"LlavaProcessor has no chat template and .* LlamaModel no image_token_id"):
        prompt_samples(endless.model.model.language_model, endless.processor, [asked])
