"""lmms-eval's scores on local tasks against the project's own, in one process."""

from __future__ import annotations

import math

import pytest
import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

from skipvision_train.data.collate import collate
from skipvision_train.data.records import Turn
from skipvision_train.errors import ConfigError, DataError, PlanError
from skipvision_train.evaluation.evaluate import predict
from skipvision_train.evaluation.lmms_eval import manifests
from skipvision_train.evaluation.lmms_eval.model import SkipVision, own_device
from skipvision_train.inference import Sampling
from skipvision_train.plans import dense, vskip

VSKIP = "vskip:layers=[0,1]"
PLANS = {"dense": dense().bind(3), "vskip": vskip([0, 1]).bind(3)}


@pytest.fixture(scope="session")
def manager(tasks):
    return TaskManager("ERROR", include_path=str(tasks), include_defaults=False)


@pytest.fixture
def run(manager, checkpoint):
    """lmms-eval's results for tasks under model arguments."""

    def evaluate(tasks: str, arguments: str = "", **options) -> dict:
        return simple_evaluate(
            model="skipvision",
            model_args=f"pretrained={checkpoint}{arguments}",
            tasks=tasks.split(","),
            task_manager=manager,
            device="cpu",
            bootstrap_iters=0,
            **{"batch_size": 3, **options},
        )

    return evaluate


def outputs(results: dict, task: str) -> list:
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0] for sample in samples]


def score(results: dict, task: str, metric: str) -> float:
    return results["results"][task][f"{metric},none"]


def test_the_entry_point_names_a_model_of_lmms_eval():
    assert get_model("skipvision") is SkipVision
    assert [manifest.model_id for manifest in manifests()] == ["skipvision"]


def own_score(assistant, records, plan) -> tuple[float, list[str]]:
    with assistant.under(plan):
        predictions = predict(assistant.model, assistant.processor, records, batch_size=2, max_new_tokens=5)
    return sum(p.correct for p in predictions) / len(predictions), [p.output for p in predictions]


@pytest.mark.parametrize(("name", "arguments"), [("dense", ""), ("vskip", f",plan={VSKIP}")])
def test_scores_are_the_own_evaluations(run, assistant, records, name, arguments):
    own, said = own_score(assistant, records, PLANS[name])
    assert 0 < own < 1
    for batch_size in (1, 3):
        results = run("tiny_answers", arguments, batch_size=batch_size)
        assert score(results, "tiny_answers", "exact_match") == pytest.approx(own)
        assert outputs(results, "tiny_answers") == said


def test_a_bank_gives_every_task_its_plan(run, bank, assistant, records):
    results = run("tiny_answers,tiny_other", f",bank={bank},max_new_tokens=5")
    for task, plan in (("tiny_answers", "vskip"), ("tiny_other", "dense")):
        own, said = own_score(assistant, records, PLANS[plan])
        assert score(results, task, "exact_match") == pytest.approx(own)
        assert outputs(results, task) == said


def test_a_plan_file(run, tmp_path, answered):
    PLANS["vskip"].save(tmp_path / "plan.json")
    results = run("tiny_answers", f",plan={tmp_path / 'plan.json'}")
    assert outputs(results, "tiny_answers") == answered["vskip"]


def slow_likelihood(assistant, conversation, answer: str) -> tuple[float, bool]:
    """Negative, and whether greedy: one forward pass over prompt and answer, without what ends it."""
    example = assistant.processor.encode([*conversation.turns, Turn("assistant", answer)], conversation.images)
    batch = collate([example], padding_side="left", pad_id=0)
    labels = batch.pop("labels")[0]
    with torch.no_grad():
        scores = assistant.model(**batch).logits[0].float().log_softmax(-1)
    places = (labels != -100).nonzero()[:, 0][:-1]
    total = sum(float(scores[place - 1, labels[place]]) for place in places)
    return -total, all(int(scores[place - 1].argmax()) == int(labels[place]) for place in places)


@pytest.mark.parametrize("name", ["dense", "vskip"])
def test_choices_by_likelihood(run, assistant, conversations, choices, name):
    with assistant.under(PLANS[name]):
        expected = [
            [slow_likelihood(assistant, asked, text) for text in texts]
            for asked, texts in zip(conversations, choices, strict=True)
        ]
    picked = [min(range(3), key=lambda choice: row[choice][0]) for row in expected]
    assert len(set(picked)) > 1
    assert any(is_greedy for row in expected for _, is_greedy in row)
    right = sum(choice == index % 3 for index, choice in enumerate(picked)) / len(picked)
    assert 0 < right < 1
    for batch_size in (1, 4):
        arguments = f",plan={VSKIP}" if name == "vskip" else ""
        results = run("tiny_choice", arguments, batch_size=batch_size)
        assert score(results, "tiny_choice", "acc") == pytest.approx(right)
        samples = sorted(results["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
        for sample, row in zip(samples, expected, strict=True):
            for (value, is_greedy), (own, own_greedy) in zip(sample["filtered_resps"], row, strict=True):
                assert math.isclose(value, own, rel_tol=1e-4)
                assert is_greedy == own_greedy


def test_rounds_go_on_until_the_task_ends_them(run, rounds):
    for batch_size in (1, 3):
        results = run("tiny_rounds", batch_size=batch_size)
        assert outputs(results, "tiny_rounds") == rounds
        assert score(results, "tiny_rounds", "rounds") == 1
        odd = sum(i % 2 for i in range(len(rounds))) / len(rounds)
        assert score(results, "tiny_rounds", "last_right") == pytest.approx(odd)


def test_stop_strings_and_limits_of_the_command_line(run, answered):
    letter = answered["dense"][0][2]
    found = outputs(run("tiny_answers", gen_kwargs=f"until={letter},max_new_tokens=4"), "tiny_answers")
    assert found == [text[:4].split(letter)[0] for text in answered["dense"]]


def test_the_limit_of_tasks_that_give_none(run):
    assert {len(text) for text in outputs(run("tiny_other", ",max_new_tokens=3"), "tiny_other")} == {3}


def test_token_counts_are_reported(run, questions):
    results = run("tiny_answers")
    counts = [sample["token_counts"][0] for sample in results["samples"]["tiny_answers"]]
    assert {count["output_tokens"] for count in counts} == {5}
    assert len({count["input_tokens"] for count in counts}) > 3


def test_a_model_of_transformers(manager, tmp_path, monkeypatch):
    from tiny_vlms import make_family

    family = make_family("llava")
    family.model.save_pretrained(tmp_path / "llava")
    family.processor.save_pretrained(tmp_path / "llava")
    found = {}
    for plan in ("dense", VSKIP):
        for batch_size in (1, 3):
            results = simple_evaluate(
                model="skipvision",
                model_args=f"pretrained={tmp_path / 'llava'},plan={plan},batch_size={batch_size}",
                tasks=["tiny_answers"],
                task_manager=manager,
                device="cpu",
                batch_size=7,  # model_args counts
                bootstrap_iters=0,
            )
            found[plan, batch_size] = outputs(results, "tiny_answers")
    assert found["dense", 1] == found["dense", 3]
    assert found[VSKIP, 1] == found[VSKIP, 3]
    assert found["dense", 1] != found[VSKIP, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("pretrained", ConfigError, "write name=value"),
        ("pretrained=MODEL,peft=x", ConfigError, "model_args.peft: unknown"),
        ("pretrained=/nowhere", ValueError, "/nowhere is no model directory"),
        ("pretrained=MODEL,device=gpu", ConfigError, "device: 'gpu' is no device"),
        ("pretrained=MODEL,precision=int4", ConfigError, "precision: 'int4' is unknown"),
        ("pretrained=MODEL,plan=vskip:layers=[7]", ValueError, "7"),
        ("pretrained=MODEL,bank=/nowhere", PlanError, "/nowhere: no plan bank"),
    ],
)
def test_a_wrong_model_argument_is_one_line(checkpoint, arguments, error, message):
    with pytest.raises(error) as raised:
        SkipVision.create_from_arg_string(arguments.replace("MODEL", str(checkpoint)), {"device": None})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_bank_of_another_model_is_refused(bank, checkpoint):
    with pytest.raises(PlanError, match="a bank of another model"):
        SkipVision(pretrained=str(checkpoint), bank=str(bank), precision="bf16")


class Request:
    def __init__(self, *args):
        self.args = args


def model_with(checkpoint, document) -> SkipVision:
    model = SkipVision(pretrained=str(checkpoint), device="cpu")
    model.task_dict["t"] = {"test": {3: document}}
    return model


@pytest.mark.parametrize(
    ("visual", "message"),
    [({"array": [0.0]}, "the task shows dict; images are"), ("/nowhere.mp4", "/nowhere.mp4")],
)
def test_what_is_no_image_is_named_with_task_and_document(checkpoint, visual, message):
    model = model_with(checkpoint, {"shown": [visual]})
    with pytest.raises(DataError, match="t, document 3: .*" + message):
        model.generate_until([Request("What?", {}, lambda doc: doc["shown"], 3, "t", "test")])


def test_likelihoods_without_a_question_are_refused(checkpoint):
    with pytest.raises(ConfigError, match="acc_mutual_info"):
        model_with(checkpoint, {}).loglikelihood([Request("", "yes")])


def test_cleaning_leaves_a_usable_model(checkpoint, answered, questions):
    model = model_with(checkpoint, questions[6])
    before = vars(model).keys()
    model.clean()
    assert vars(model).keys() == before
    request = Request(questions[6]["question"], {"max_new_tokens": 5}, None, 3, "t", "test")
    assert model.generate_until([request])[0].text == answered["dense"][6]


class Processes:
    num_processes = 2
    device = torch.device("cuda:1")


def test_every_process_has_a_device_of_its_own():
    assert own_device(None, Processes) == own_device("cuda", Processes) == own_device("cuda:1", Processes) == "cuda:1"
    with pytest.raises(
        ConfigError, match=r"device: cpu, but 2 processes run on cuda; for the CPU set ACCELERATE_USE_CPU=true"
    ):
        own_device("cpu", Processes)
    with pytest.raises(ConfigError, match="device: cuda:0"):
        own_device("cuda:0", Processes)


def test_sampling_is_used(checkpoint, questions):
    model = model_with(checkpoint, questions[6])
    request = Request(questions[6]["question"], {"temperature": 50.0, "max_new_tokens": 8}, None, 3, "t", "test")
    said = set()
    for seed in range(3):
        torch.manual_seed(seed)
        said.add(model.generate_until([request])[0].text)
    assert len(said) == 3
    assert Sampling(8).temperature == 0
