"""lmms-eval's own run on local tasks. ``make test-lmms-eval`` runs this folder in an environment with lmms-eval."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import numpy as np
import pytest
import torch
from byte_tokenizer import IMAGE_TOKEN, byte_tokenizer
from PIL import Image
from transformers import LlamaConfig

from skipvision_train.calibration.bank import BankFacts, PlanBank
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.data.recipes import load_recipe, load_records
from skipvision_train.inference import Assistant, Conversation, Sampling
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.connector_settings import ResamplerConfig
from skipvision_train.models.identity import model_hash
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.settings import ReducerConfig, VisionConfig
from skipvision_train.plans import dense, vskip

if find_spec("lmms_eval") is None:  # the project's own environment cannot hold it
    collect_ignore_glob = ["test_harness.py", "test_ranks.py"]
else:  # users have neither of these beside lmms-eval; here they can be seen through the environment below (Makefile)
    sys.modules.update(dict.fromkeys(("hydra", "omegaconf", "deepspeed")))

LETTERS = "abcdefghij"
DOCUMENTS = 7
"""Odd, so that two ranks and batches of 3 do not divide it."""


def tiny_model() -> SkipVisionForConditionalGeneration:
    """Dense; answers are words of ten letters that depend on image, question and plan."""
    tokenizer = byte_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    config = SkipVisionConfig(
        text,
        VisionConfig(image_size=32, patch_size=4, width=32, layers=3, heads=2, mlp_ratio=2.0, depths=(1, 2)),
        ResamplerConfig(windows=(8, 4, 2), queries=(2, 4, 16), head_dim=16),
        ReducerConfig(local_keep=6),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    torch.manual_seed(0)
    model = SkipVisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
        head = model.language_model.lm_head.weight
        others = torch.ones(len(head), dtype=torch.bool)
        others[tokenizer.convert_tokens_to_ids(list(LETTERS))] = False
        head[others] = 0  # some letter's logit is above 0
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model = tiny_model()
    model.save_pretrained(folder)
    SkipVisionProcessor.from_config(model.config, byte_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def assistant(checkpoint) -> Assistant:
    return Assistant.open(checkpoint, device="cpu")


PLANS = {"dense": dense().bind(3), "vskip": vskip([0, 1]).bind(3)}


@pytest.fixture(scope="session")
def bank(assistant, tmp_path_factory) -> Path:
    """``tiny_answers`` has a plan of its own, every other task is dense."""
    folder = tmp_path_factory.mktemp("bank") / "bank"
    facts = BankFacts(model_hash(assistant.model), "dense", "vig", "zero", 0, {"tiny_answers": ["1"]}, {}, "2026-01-01")
    PlanBank.create(folder, {"tiny_answers": PLANS["vskip"]}, PLANS["dense"], facts)
    return folder


@pytest.fixture(scope="session")
def shown(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    paths = [str(folder / f"{i}.png") for i in range(DOCUMENTS)]
    for i, path in enumerate(paths):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 20 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


@pytest.fixture(scope="session")
def questions(shown) -> list[dict]:
    """About one image, two, one within the text, and none."""
    kinds = [
        ("Which colour?", 1),
        ("The same?", 2),
        ("Look: <image> what?", 1),
        ("How do I write <image> tags?", 0),
        ("Which letter?", 1),
        ("Is <image> or <image> bigger?", 2),
        ("Say it.", 0),
    ]
    return [{"question": text, "images": [*shown[i:], *shown][:count]} for i, (text, count) in enumerate(kinds)]


def ask(assistant: Assistant, question: dict, sampling: Sampling) -> str:
    """One by one, in the order in which a person would write it."""
    text = question["question"] if question["images"] else question["question"].replace("<image>", "[image]")
    return assistant.ask(text, question["images"], sampling)


@pytest.fixture(scope="session")
def answered(assistant, questions) -> dict[str, list[str]]:
    """Per plan the right answers to all questions, one by one."""
    found = {}
    for name, plan in PLANS.items():
        with assistant.under(plan):
            found[name] = [ask(assistant, question, Sampling(5)) for question in questions]
    assert sum(a != b for a, b in zip(*found.values(), strict=True)) >= 4
    return found


@pytest.fixture(scope="session")
def choices(answered) -> list[list[str]]:
    """Per document how its dense answer begins, at changing places among others."""
    own = [text[:2] for text in answered["dense"]]
    listed = [[text, "had", "jigg"] for text in own]
    return [texts[i % 3 :] + texts[: i % 3] for i, texts in enumerate(listed)]


@pytest.fixture(scope="session")
def rounds(assistant, questions) -> list[list[str]]:
    """Per document the answers of its one to three rounds, dense."""
    found = []
    for index, question in enumerate(questions):
        said = [ask(assistant, question, Sampling(4))]
        for _ in range(index % 3):
            said.append(assistant.ask(f"You said {said[-1]}. And now?", question["images"][:1], Sampling(4)))
        found.append(said)
    return found


@pytest.fixture(scope="session")
def data(questions, answered, choices, rounds, tmp_path_factory) -> Path:
    """The tasks' files, and a recipe of the same questions for the project's own evaluation.

    Some of the right answers in the files are what the dense model says, some what it says under the plan.
    """
    folder = tmp_path_factory.mktemp("data")
    sources = ["dense", "vskip", "dense", "none", "dense", "vskip", "dense"]
    right = [f"{answered[s][i].upper()}." if s in answered else "nothing" for i, s in enumerate(sources)]
    answers = [{**q, "answer": a} for q, a in zip(questions, right, strict=True)]
    choice = [{**q, "choices": c, "gold": i % 3} for i, (q, c) in enumerate(zip(questions, choices, strict=True))]
    asked = [
        {**q, "rounds": len(said), "answer": said[-1] if i % 2 else "nothing"}
        for i, (q, said) in enumerate(zip(questions, rounds, strict=True))
    ]
    for name, documents in (("answers", answers), ("choice", choice), ("rounds", asked)):
        (folder / f"{name}.json").write_text(json.dumps(documents))
    entries = []
    for index, document in enumerate(answers):
        images, text = document["images"], document["question"]
        if not images:
            text = text.replace("<image>", "[image]")
        elif "<image>" not in text:
            text = "<image>\n" * len(images) + text
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": document["answer"]}]
        entries.append({"id": str(index), "image": images, "conversations": turns})
    root = Path(questions[0]["images"][0]).parent
    for entry in entries:
        entry["image"] = [Path(image).name for image in entry["image"]]
    (folder / "records.json").write_text(json.dumps(entries))
    (folder / "recipe.yaml").write_text(f"sources:\n  - {{name: tiny, path: records.json, image_root: {root}}}\n")
    return folder


@pytest.fixture(scope="session")
def records(data):
    return load_records(load_recipe(data / "recipe.yaml")).read_all()


@pytest.fixture(scope="session")
def tasks(data, tmp_path_factory) -> Path:
    """The folder of tasks, with the place of the data in them."""
    folder = tmp_path_factory.mktemp("tasks")
    for file in (Path(__file__).parent / "tasks").iterdir():
        if file.suffix == ".yaml":
            (folder / file.name).write_text(file.read_text().replace("DATA", str(data)))
        elif file.suffix == ".py":
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def conversations(questions) -> list[Conversation]:
    return [
        Conversation().ask(q["question"] if q["images"] else q["question"].replace("<image>", "[image]"), q["images"])
        for q in questions
    ]
