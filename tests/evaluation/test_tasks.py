"""From records to scores: which metric, what it needs, and what a task's answers come to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from skipvision_train.cli import run_command
from skipvision_train.commands.evaluate import limit_per_task
from skipvision_train.data.recipes import load_recipe, load_records
from skipvision_train.data.records import ImageRef, Record, Turn
from skipvision_train.errors import ConfigError, DataError
from skipvision_train.evaluation.bootstrap import RESAMPLES, figure, mean_score, resampled_sums
from skipvision_train.evaluation.evaluate import predict, task_of
from skipvision_train.evaluation.metrics import accuracy_interval
from skipvision_train.evaluation.results import EvaluationResult, Prediction, Scores
from skipvision_train.evaluation.tasks import JUDGED, METRICS, check_targets, target_of, with_metric
from skipvision_train.inference import Assistant, Conversation


def record(answer: str = "yes", identity: str = "r", task: str = "t", **extras: object) -> Record:
    return Record(identity, "s", (), (Turn("user", "q"), Turn("assistant", answer)), task, extras)


def judged(output: str, **given: object) -> Prediction:
    """What ``predict`` would have made of an output."""
    target = target_of(record(**given))
    verdict = METRICS[target.metric].judge(output, target)
    answer = str(given.get("answer", "yes"))
    return Prediction(
        "r",
        "t",
        (),
        "q",
        answer,
        output,
        verdict.score,
        {},
        (),
        target.metric,
        target.category,
        target.group,
        verdict.read,
    )


# --- records and sources -------------------------------------------------------------------------------------------


def write(root, entries, **source):
    (root / "own.json").write_text(json.dumps(entries))
    given = {"name": "own", "path": "own.json", "format": "vqa", **source}
    (root / "own.yaml").write_text(json.dumps({"sources": [given]}))
    return root / "own.yaml"


def test_a_source_names_the_metric_of_records_that_name_none(tmp_path):
    entries = [
        {"question": "q", "answers": [{"answer": "red"}, {"answer": "blue"}, {"answer": "blue"}, {"answer": "red"}]},
        {"question": "q", "answer": "no", "metric": "yes_no", "category": "random", "task": "pope", "group": 3},
    ]
    records = load_records(load_recipe(write(tmp_path, entries, metric="vqa_accuracy"))).read_all()
    first, second = map(target_of, records)
    assert (first.metric, first.answers) == ("vqa_accuracy", ("red", "blue", "blue", "red"))
    assert records[0].turns[-1].text == "red"  # of the commonest the first
    assert (second.metric, second.answers, second.category, second.group) == ("yes_no", ("no",), "random", "3")


def test_fields_of_other_shapes_do_not_disturb_training(tmp_path):
    """What they mean is asked by evaluation alone."""
    entries = [{"question": "q", "answer": "x", "choices": {"a": 1}, "category": 2.5, "metric": ["odd"]}]
    (found,) = load_records(load_recipe(write(tmp_path, entries))).read_all()
    with pytest.raises(DataError, match=r"record 0 of own, metric.*'metric' must be a text, found a list"):
        target_of(found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": "vqa_accuracy"}, "'answers' has 1"),
        ({"metric": "vqa_accuracy", "answers": ["x"] * 3}, "'answers' has 3; one of each person is needed"),
        ({"metric": "vqa_accuracy", "answers": "x"}, "'answers' must be a list of texts"),
        ({"metric": "anls", "answers": ["x", " "]}, "'answers' holds an empty text"),
        ({"metric": "yes_no", "answer": "perhaps"}, "yes or no is expected"),
        ({"metric": "multiple_choice", "answer": "E", "choices": ["x", "y"]}, "neither a letter from A to B"),
        ({"metric": "multiple_choice", "answer": "B", "choices": "xy"}, "'choices' must be a list"),
        ({"metric": "multiple_choice_likelihood", "answer": "x", "choices": ["x"]}, "at least 2 different texts"),
        ({"metric": "multiple_choice_likelihood", "answer": "x", "choices": ["x", "x"]}, "at least 2 different texts"),
        (
            {"metric": "multiple_choice_likelihood", "answer": "x", "choices": ["x", "y", "y"]},
            "'choices' has 3; at least 2 different texts",
        ),
        ({"metric": "multiple_choice_likelihood", "answer": "x", "choices": ["x", "y", " "]}, "holds an empty text"),
        ({"metric": "multiple_choice", "answer": "A", "choices": ["x"] * 27}, "'choices' must be a list of at most 26"),
        ({"metric": "mme", "category": "count", "group": True}, "'group' must be a text, found a boolean"),
        ({"metric": "mme", "category": "smell", "group": "1"}, "'category' is 'smell'; MME has existence"),
        ({"metric": "mme", "category": "OCR"}, "'group' is missing"),
    ],
)
def test_what_a_metric_lacks_is_named(given, message):
    with pytest.raises(DataError, match=f"record r of s, metric {given['metric']}: .*{message}"):
        target_of(record(**given))


@pytest.mark.parametrize("name", ["bleu", *JUDGED])
def test_metrics_that_do_not_exist_here(name):
    with pytest.raises(ConfigError, match="lmms-eval" if name in JUDGED else "use one of exact_match, vqa_accuracy"):
        with_metric([record()], name)
    with pytest.raises(ConfigError, match=name):
        target_of(record(metric=name))


def test_a_default_metric_is_no_override():
    given = with_metric([record(), record(metric="yes_no")], "anls")
    assert [target_of(r).metric for r in given] == ["anls", "yes_no"]
    assert target_of(record()).metric == "exact_match"


def test_any_of_several_answers_is_right():
    assert judged("Blue.", answer="red", answers=["red", "blue"]).score == 1
    assert judged("red", answer="red", answers=["blue"]).score == 0
    assert judged("102", metric="relaxed_accuracy", answers=["7", "100"]).score == 1
    assert judged("says hi", metric="ocrbench", answers=["ho", "HI"]).score == 1


def test_several_answers_count_only_where_the_metric_takes_them():
    assert target_of(record("yes", metric="yes_no", answers=["no"])).answers == ("yes",)
    assert judged("no", metric="yes_no", answer="yes", answers=["no"]).score == 0


def test_options_whose_texts_are_letters():
    """A letter names a place where letters are read, and a text where texts are compared."""
    given = {"answer": "A", "choices": ["B", "A"]}
    assert [judged(o, metric="multiple_choice_likelihood", **given).score for o in ("A", "B")] == [1, 0]
    assert [judged(o, metric="multiple_choice", **given).score for o in ("A", "B")] == [1, 0]
    given = {"answer": "A", "choices": ["B", "C"]}  # no text of that name: the first option
    assert [judged(o, metric="multiple_choice_likelihood", **given).score for o in ("B", "C")] == [1, 0]


def test_questions_without_a_group_belong_to_their_images():
    two = Record("r", "s", tuple(ImageRef(Path(name)) for name in "ab"), record().turns, "t", {})
    assert target_of(two).group == "a, b"
    assert target_of(replace(two, extras={"group": 7})).group == "7"
    assert target_of(replace(two, images=(ImageRef(Path("a"), data=b"x"),))).group is None  # bytes have no name


def test_one_task_has_one_metric():
    with pytest.raises(DataError, match=r"task 't': record b of s is scored by anls, others by exact_match"):
        check_targets([record(), record(identity="b", metric="anls")], task_of)
    check_targets([record(), record(identity="b", metric="anls", task="u")], task_of)


def test_mme_comes_in_pairs():
    three = [record(identity=str(i), metric="mme", category="count", group="i") for i in range(3)]
    with pytest.raises(DataError, match="task 't', count: 3 questions in group 'i'"):
        check_targets(three, task_of)
    with pytest.raises(DataError, match="task 't', count: 1 questions in group 'i'"):
        check_targets(three[:1], task_of)
    check_targets(
        [
            *three[:2],
            replace(three[2], extras={**three[2].extras, "category": "scene"}),
            *(record(metric="mme", category="scene", group="i"),),
        ],
        task_of,
    )


def test_a_limit_keeps_pairs_together():
    pairs = [record(identity=f"{i}", metric="mme", category="count", group=str(i // 2)) for i in range(20)]
    few = limit_per_task(pairs, 7, 0)
    assert len(few) == 6
    check_targets(few, task_of)
    with pytest.raises(ConfigError, match="limit: 1; task 't' scores 2 questions together"):
        limit_per_task(pairs, 1, 0)


# --- figures -------------------------------------------------------------------------------------------------------


def test_pope_by_hand():
    """random: tp 2, fp 1, fn 0, tn 1; popular: tp 0, fp 0, fn 1, tn 1."""
    said = [
        ("random", "yes", "Yes."),
        ("random", "yes", "yes, it is"),
        ("random", "no", "maybe"),
        ("random", "no", "No"),
    ]
    said += [("popular", "yes", "There is no dog."), ("popular", "no", "no")]
    rows = [judged(output, metric="yes_no", answer=answer, category=split) for split, answer, output in said]
    scores = Scores.of(rows)
    found = {name: f.value for name, f in scores.details["t"].items()}
    assert scores.tasks["t"].value == pytest.approx(4 / 6)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert (found["yes_ratio"], found["unread"]) == pytest.approx((3 / 6, 1 / 6))
    assert (found["random.precision"], found["random.recall"], found["random.f1"]) == pytest.approx((2 / 3, 1, 0.8))
    assert (found["popular.precision"], found["popular.recall"], found["popular.f1"]) == (0, 0, 0)
    assert found["popular.accuracy"] == 0.5
    nothing = scores.details["t"]["popular.precision"]
    assert (nothing.low, nothing.high, nothing.total) == (0, 1, 0)  # nobody said yes: nothing is known
    assert scores.details["t"]["recall"].low == pytest.approx(accuracy_interval(2, 3)[0])


def test_mme_by_hand():
    """count: 3 of 4 right, 1 of 2 images: 75 + 50. ocr: all right: 200. code_reasoning: 1 of 2, no image: 50."""
    outcomes = {"count": ["YY", "YN"], "OCR": ["YY"], "code_reasoning": ["NY"]}
    rows = [
        judged("yes" if letter == "Y" else "no", metric="mme", answer="yes", category=category, group=f"{category}{i}")
        for category, images in outcomes.items()
        for i, answers in enumerate(images)
        for letter in answers
    ]
    scores = Scores.of(rows)
    found = {name: (f.value, f.maximum) for name, f in scores.details["t"].items()}
    assert found["count"] == (125, 200)
    assert (found["count.accuracy"], found["count.accuracy_plus"]) == ((0.75, 1), (0.5, 1))
    assert (found["ocr"], found["code_reasoning"]) == ((200, 200), (50, 200))
    assert (found["perception"], found["cognition"], found["score"]) == ((325, 400), (50, 200), (375, 600))
    assert scores.tasks["t"].value == pytest.approx(375 / 600)
    assert scores.details["t"]["ocr"].low < 200
    assert Scores.of(rows[::-1]) == scores
    with pytest.raises(ValueError, match="1 answers in group"):
        Scores.of(rows[1:])


def test_a_perfect_mme_has_2800_points():
    from skipvision_train.evaluation.yes_no import COGNITION, PERCEPTION

    rows = [
        judged(answer, metric="mme", answer=answer, category=category, group=str(i))
        for category in (*PERCEPTION, *COGNITION)
        for i in range(3)
        for answer in ("yes", "no")
    ]
    figures = Scores.of(rows).details["t"]
    assert (figures["perception"].value, figures["cognition"].value, figures["score"].value) == (2000, 800, 2800)
    assert 0 < figures["score"].low < figures["score"].high == 2800


def test_ocrbench_counts():
    kinds = ["Regular Text Recognition", "Digit String Recognition", "Doc-oriented VQA"]
    rows = [judged("abc", metric="ocrbench", answer=a, category=k) for k, a in zip(kinds * 2, "abxcxx", strict=True)]
    figures = Scores.of(rows).details["t"]
    assert {name: (f.value, f.maximum) for name, f in figures.items()} == {
        "score": (3, 6),
        "Text Recognition": (3, 4),
        "Regular Text Recognition": (2, 2),
        "Digit String Recognition": (1, 2),
        "Doc-oriented VQA": (0, 2),
    }


def test_categories_and_unread_letters():
    rows = [
        judged(output, metric="multiple_choice", answer="B", choices=["x1", "y1"], category=category)
        for output, category in (("B", "art"), ("dunno", "art"), ("y1", "law"))
    ]
    assert [row.read for row in rows] == ["B", "", "B"]
    figures = Scores.of(rows).details["t"]
    assert {name: f.value for name, f in figures.items()} == pytest.approx({"unread": 1 / 3, "art": 0.5, "law": 1})


def test_graded_scores_are_not_counted_as_right_or_wrong():
    answers = ["red"] * 2 + ["blue"] * 8
    rows = [judged(o, metric="vqa_accuracy", answers=answers, category="c") for o in ("red", "blue", "green")]
    assert [round(row.score, 3) for row in rows] == [0.6, 1, 0]
    assert [row.correct for row in rows] == [True, True, False]
    scores = Scores.of(rows)
    assert scores.tasks["t"].value == pytest.approx(1.6 / 3)
    assert scores.details["t"]["c"].value == pytest.approx(1.6 / 3)
    with pytest.raises(ValueError, match="scored by vqa_accuracy and exact_match"):
        Scores.of([*rows, judged("yes")])


# --- intervals -----------------------------------------------------------------------------------------------------


def test_resampled_sums_have_the_moments_of_draws_with_replacement():
    units = np.random.default_rng(0).random((40, 2))
    sums = resampled_sums(units, seed=1)
    assert sums.shape == (RESAMPLES + 1, 2)
    assert sums[0] == pytest.approx(units.sum(0))
    assert sums[1:].mean(0) == pytest.approx(units.sum(0), rel=0.02)
    assert np.cov(sums[1:].T) == pytest.approx(40 * np.cov(units.T, bias=True), rel=0.15, abs=0.3)
    assert (resampled_sums(units[::-1], seed=1) == sums).all()
    assert (resampled_sums(units, seed=2)[1:] != sums[1:]).any()
    assert (resampled_sums(units, 1, "other")[1:] != sums[1:]).any()


def test_equal_rows_are_drawn_as_often_as_they_stand_there():
    sums = resampled_sums(np.array([[0.0]] * 90 + [[1.0]] * 10), seed=0)
    assert sums[1:].mean() == pytest.approx(10, abs=0.5)
    assert sums[1:].var() == pytest.approx(100 * 0.1 * 0.9, rel=0.15)


def test_a_graded_mean_has_about_the_normal_interval():
    scores = list(np.random.default_rng(3).random(400))
    found = mean_score(scores, seed=0)
    half = 1.96 * float(np.std(scores)) / 20
    assert (found.value, found.total) == (pytest.approx(np.mean(scores)), 400)
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.1)
    with pytest.raises(ValueError, match="no scores"):
        mean_score([], 0)


def test_equal_scores_still_have_an_interval():
    found = mean_score([1.0] * 20, seed=0)
    assert (found.low, found.high) == accuracy_interval(20, 20)
    half = mean_score([0.5] * 20, seed=0)
    assert (half.low, half.high) == pytest.approx(accuracy_interval(10, 20))
    points = figure(np.full(11, 200.0), 200.0, 8, 4)
    assert points.low == pytest.approx(200 * accuracy_interval(4, 4)[0])
    assert points.total == 8


# --- a model -------------------------------------------------------------------------------------------------------

CHOICES = ["red", "two", "not", "sky"]


@pytest.fixture
def quiz(records) -> list[Record]:
    """The questions, every second one with choices of which the likeliest is taken."""
    found = []
    for i, r in enumerate(records):
        extras = {"metric": "multiple_choice_likelihood", "choices": CHOICES}
        turns = (*r.turns[:-1], Turn("assistant", "not"))
        found.append(replace(r, turns=turns, task="choice", extras=extras) if i % 2 else r)
    return found


def test_choices_by_likelihood(model, processor, quiz):
    """Against the assistant, one question at a time."""
    assistant = Assistant(model, processor)
    whole = predict(model, processor, quiz, 4, 4)
    for r, prediction in zip(quiz, whole, strict=True):
        assert prediction.record_id == r.id
        if prediction.metric != "multiple_choice_likelihood":
            continue
        conversation = Conversation(r.turns[:-1], tuple(image for image in map(opened, r.images)))
        (scores,) = assistant.log_likelihoods([conversation], [CHOICES])
        assert prediction.output == CHOICES[int(torch.tensor([s.log_prob for s in scores]).argmax())]
        assert prediction.score == (prediction.output == "not")
    assert len({p.output for p in whole if p.task == "choice"}) > 1


def opened(image):
    from PIL import Image

    return Image.open(image.path).convert("RGB")


def test_no_metric_depends_on_the_batch_size(model, processor, quiz):
    whole = predict(model, processor, quiz, 4, 4)
    for size in (1, 3, 14):
        again = predict(model, processor, quiz, size, 4)
        assert again == whole
        assert Scores.of(again) == Scores.of(whole)


# --- the command and its file --------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(data) -> Callable[[list[dict]], str]:
    def make(entries: list[dict]) -> str:
        return str(write(data, entries, image_root="images"))

    return make


def test_the_command_scores_reports_and_stores(checkpoint, benchmark, tmp_path, capsys):
    entries = [
        {"image": f"{i // 2}.png", "question": f"Really {i}?", "answer": "yes", "task": "mme", "metric": "mme"}
        | {"category": "count" if i < 4 else "scene"}
        for i in range(6)
    ]
    entries += [{"question": "Why?", "answer": "red", "task": "free"}]
    given = [f"checkpoint={checkpoint}", f"recipe={benchmark(entries)}", f"output={tmp_path / 'e'}", "metric=anls"]
    run_command("evaluate", [*given, "max_new_tokens=2"])
    text = capsys.readouterr().out
    assert "mme (mme)\n  score: " in text
    assert " of 400 (" in text
    path = tmp_path / "e" / "evaluation.json"
    result = EvaluationResult.load(path)
    assert result.scores.metrics == {"free": "anls", "mme": "mme"}
    assert result.scores == Scores.of(result.predictions, result.seed)
    stored = json.loads(path.read_text())
    assert stored["tasks"]["mme"]["details"]["perception"]["maximum"] == 400
    assert {p["metric"] for p in stored["predictions"]} == {"anls", "mme"}


def test_mistakes_are_found_before_the_model_is_loaded(benchmark, tmp_path, capsys):
    recipe = benchmark([{"question": "q", "answer": "red", "metric": "yes_no"}])
    given = ["checkpoint=nowhere", f"recipe={recipe}", f"output={tmp_path / 'e'}"]
    for more, message in ([], "record 0 of own, metric yes_no"), (["metric=mm_vet"], "metric 'mm_vet': MM-Vet grades"):
        with pytest.raises(SystemExit):
            run_command("evaluate", [*given, *more])
        assert message in capsys.readouterr().err


def test_files_of_version_2_are_read(model, processor, records, tmp_path):
    from skipvision_train.evaluation.evaluate import sample_cost

    made = predict(model, processor, records[:3], 3, 2)
    new = EvaluationResult("c", "r", model.plan, Scores.of(made), sample_cost(model, made), tuple(made))
    old = new.to_dict() | {"format_version": 2}
    for task in old["tasks"].values():
        del task["metric"], task["details"]
    for row in old["predictions"]:
        row["correct"] = bool(row.pop("score"))
        for name in ("metric", "category", "group", "read"):
            del row[name]
    (tmp_path / "old.json").write_text(json.dumps(old))
    read = EvaluationResult.load(tmp_path / "old.json")
    assert read.scores.tasks == new.scores.tasks
    assert read.scores.metrics == new.scores.metrics
    assert [(p.record_id, p.score) for p in read.predictions] == [(p.record_id, p.score) for p in made]
    (tmp_path / "next.json").write_text(json.dumps(old | {"format_version": 4}))
    with pytest.raises(DataError, match=r"next\.json: not an evaluation of format_version 2 or 3"):
        EvaluationResult.load(tmp_path / "next.json")
