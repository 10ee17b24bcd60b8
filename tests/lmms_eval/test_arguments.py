"""What lmms-eval hands over as text: read, or refused in one line."""

from __future__ import annotations

import pytest

from skipvision_train.config.plans import PlanSpec
from skipvision_train.errors import ConfigError
from skipvision_train.evaluation.lmms_eval.arguments import Generation, ModelArguments, parse_plan, place_images
from skipvision_train.inference import Sampling


def test_arguments_have_defaults_and_types():
    given = ModelArguments.read({"pretrained": "m", "batch_size": "4", "max_new_tokens": 8.0, "plan": "dense"})
    assert given == ModelArguments("m", PlanSpec("dense"), batch_size=4, max_new_tokens=8)
    assert ModelArguments.read({"pretrained": 7, "device": None}) == ModelArguments("7")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("own", PlanSpec("own")),
        ("vskip:count=8", PlanSpec("vskip", count=8)),
        ("vskip:layers=[20, 21]:bypass=norm", PlanSpec("vskip", layers=[20, 21], bypass="norm")),
        ("fastv:layer=2:keep=0.5", PlanSpec("fastv", layer=2, keep=0.5)),
        ("pyramiddrop:layers=[1,2]:keep=[0.5,4]", PlanSpec("pyramiddrop", layers=[1, 2], keep=[0.5, 4])),
        ("skip_kv:level=middle + small", PlanSpec("skip_kv", level="middle + small")),
        ("bank:path=plans/b:task=gqa", PlanSpec("bank", path="plans/b", task="gqa")),
    ],
)
def test_a_plan_is_one_word(text, spec):
    assert parse_plan(text) == spec


def test_a_plan_is_a_file_whatever_its_name(tmp_path):
    file = tmp_path / "a:b.json"
    file.write_text("{}")
    assert parse_plan(str(file)) == PlanSpec("file", path=str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "model_args.pretrained: missing"),
        ({"pretrained": "m", "peft": "x"}, "model_args.peft: unknown; use pretrained, plan, bank"),
        ({"pretrained": "m", "plan": "dense", "bank": "b"}, "model_args.bank: given with plan"),
        ({"pretrained": "m", "batch_size": "auto"}, "model_args.batch_size: 'auto'; use a whole number"),
        ({"pretrained": "m", "batch_size": 0}, "model_args.batch_size: 0"),
        ({"pretrained": "m", "max_new_tokens": 2.5}, "model_args.max_new_tokens: 2.5"),
        ({"pretrained": "m", "plan": "vskp:count=3"}, "neither a file nor a method; methods are own, dense"),
        ({"pretrained": "m", "plan": "vskip:keep=3"}, "vskip has no field 'keep=3'; its fields are layers="),
        ({"pretrained": "m", "plan": "dense:3"}, "dense has no field '3'; its fields are none"),
        ({"pretrained": "m", "plan": "vskip:count=two"}, "count=two; vskip needs a whole number"),
        ({"pretrained": "m", "plan": "vskip:count=true"}, "count=true; vskip needs a whole number"),
        ({"pretrained": "m", "plan": "vskip:layers=3"}, "layers=3; vskip needs a list"),
        ({"pretrained": "m", "plan": "vskip:layers=[a]"}, "vskip needs a list"),
        ({"pretrained": "m", "plan": "vskip:layers=[1"}, "cannot be read as a value"),
        ({"pretrained": "m", "plan": "fastv:keep=half"}, "keep=half; fastv needs a whole number or a number or a list"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message):
    with pytest.raises(ConfigError) as error:
        ModelArguments.read(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({}, Sampling(9)),
        ({"max_new_tokens": 16, "temperature": 0.0, "top_p": 0, "num_beams": 1, "do_sample": False}, Sampling(16)),
        ({"temperature": 0.7, "do_sample": False}, Sampling(9)),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5}, Sampling(9, 0.7, 0.9, 5)),
        ({"do_sample": True, "top_p": None}, Sampling(9, 1.0)),
        ({"do_sample": True, "temperature": 0}, Sampling(9)),
        ({"image_aspect_ratio": "original"}, Sampling(9)),
    ],
)
def test_generation_settings_of_tasks(settings, sampling):
    assert Generation.read(settings, 9) == Generation(sampling, ())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs.num_beams: 4"),
        ({"until": [3]}, "generation_kwargs.until"),
        ({"temperature": -1}, "generation_kwargs.temperature: -1"),
        ({"max_new_tokens": "none"}, "generation_kwargs.max_new_tokens: 'none'; use a number"),
        ({"max_new_tokens": 0}, "generation_kwargs.max_new_tokens: 0"),
        ({"top_p": "much"}, "generation_kwargs.top_p: 'much'; use a number"),
    ],
)
def test_generation_settings_that_cannot_run(settings, message):
    with pytest.raises(ConfigError, match=message):
        Generation.read(settings, 9)


def test_an_answer_ends_before_the_first_stop_string():
    settings = Generation.read({"until": ["ASSISTANT:", "\n\n", "", "b"]}, 9)
    assert settings.cut(" one\n\ntwo b ASSISTANT: three") == "one\n\ntwo"
    assert settings.cut("one") == "one"
    assert Generation.read({"until": "x"}, 9).until == ("x",)
    assert Generation.read({"until": None}, 9).until == ()


@pytest.mark.parametrize(
    ("text", "images", "placed"),
    [
        ("What?", 0, "What?"),
        ("What?", 2, "<image>\n<image>\nWhat?"),
        ("First <image>, then <image>.", 2, "First <image>, then <image>."),
        ("In <image> and again <image>.", 1, "<image>\nIn [image] and again [image]."),
        ("An <image> tag.", 0, "An [image] tag."),
    ],
)
def test_images_stand_where_markers_say_or_first(text, images, placed):
    assert place_images(text, images) == placed
