"""The report: complete, self-contained, and safe whatever the data says."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from skipvision_train.analysis import calibration_report
from skipvision_train.analysis.calibration_report import (
    Calibration,
    budgets_for,
    layer_table,
    read_calibration,
    section,
    skipped_by_budget,
)
from skipvision_train.analysis.report import (
    ReportInputs,
    choose_examples,
    picture_uri,
    read_metrics,
    render_report,
)
from skipvision_train.calibration.curves import Curve, Point
from skipvision_train.calibration.scores import ScoreTable
from skipvision_train.calibration.search import Estimate
from skipvision_train.commands import report
from skipvision_train.errors import DataError
from skipvision_train.evaluation.metrics import Accuracy
from skipvision_train.evaluation.results import EvaluationResult, Prediction, Scores
from skipvision_train.plans import vskip

LOSSES = {"pretrain": [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}], "sft": [{"step": 1, "loss": 2.0}]}


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def links(self):
        return [v for _, attrs in self.tags for k, v in attrs.items() if k in ("src", "href", "srcset")]


class Pictures:
    """Hands out a plain picture per path and remembers which were asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, path):
        self.asked.append(path)
        return Image.new("RGB", (16, 8), "red")


@pytest.fixture
def inputs(evaluation_factory):
    own = evaluation_factory()
    other = evaluation_factory(right=4, plan=vskip([2]).bind(3), blind=None, timing=None)
    return ReportInputs("A title", LOSSES, own, {"V-Skip": other}, {"vskip": Calibration([0.5, 0.1, 0.0], [2])})


def test_page_holds_every_picture_and_no_link_out(inputs):
    pictures = Pictures()
    html = render_report(inputs, pictures)
    page = Page(html)
    links = page.links()
    # Two losses, the bars, the profile and the skip map in two themes each, and one picture per example.
    assert len(links) == 2 * 5 + 12
    assert len(pictures.asked) == len(set(pictures.asked)) == 12
    for link in links:
        head, content = link.split(",", 1)
        assert head == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(content, validate=True))).verify()
    assert not re.search(r"https?://|@import|url\(", html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe"})


def test_numbers_of_the_table(inputs):
    text = " ".join(" ".join(Page(render_report(inputs, Pictures())).text).split())
    assert "62.5" in text  # 5 of 8
    assert "50.0" in text  # V-Skip, 4 of 8
    assert "12.5" in text  # blind, 1 of 8
    assert re.search(r"30\.6 \S 86\.3", text)  # Wilson 5 of 8
    assert "4.00 GFLOPs" in text
    assert "2.00 GFLOPs 50.0 %" in text
    assert "1.0 KiB 25.0 %" in text
    assert "15.5 ms dense 20.2 ms" in text


def test_text_of_the_data_is_escaped(evaluation_factory):
    evil = "<script>alert('x')</script>\"&"
    shown = Prediction(evil, evil, ("a.png",), evil, evil, evil, False)
    own = evaluation_factory(
        predictions=(shown,), scores=Scores.of([shown]), checkpoint=evil, recipe=evil, blind=None, timing=None
    )
    html = render_report(ReportInputs(evil, {evil: LOSSES["sft"]}, own, {evil: own}), Pictures())
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 8
    assert "script" not in {tag for tag, _ in Page(html).tags}


def test_a_bare_evaluation_is_enough(evaluation_factory):
    own = replace(evaluation_factory(), blind=None, timing=None)
    html = render_report(ReportInputs("t", {}, own, examples=0), Pictures())
    assert "Training" not in html
    assert "Held-out" not in html
    assert "Blind" not in html
    assert "Calibration" not in html


def test_a_calibration_alone_is_enough():
    """Of a model that nobody evaluated, such as those of transformers."""
    html = render_report(ReportInputs("t", {}, calibrations={"vskip": Calibration([0.5, 0.1, 0.0], [2])}), Pictures())
    assert "Calibration" in html
    for absent in ("Accuracy", "Cost of one sample", "Held-out"):
        assert absent not in html


def test_examples_mix_tasks_and_verdicts(evaluation_factory):
    predictions = evaluation_factory().predictions
    chosen = choose_examples(predictions, 12)
    assert [sum(p.task == task for p in chosen) for task in ("colour", "count", "text")] == [4, 4, 4]
    assert sum(p.correct for p in chosen) == 6
    assert len({p.record_id for p in chosen}) == 12
    assert choose_examples(predictions, 12) == chosen


def test_examples_run_out():
    few = [Prediction(str(i), "t", (), "q", "a", "a", True) for i in range(3)]
    assert choose_examples(few, 12) == few
    assert choose_examples([], 12) == []


def test_examples_prefer_new_pictures():
    same = [Prediction(f"a{i}", "t", ("a.png",), "q", "a", "a", True) for i in range(5)]
    other = Prediction("b", "t", ("b.png",), "q", "a", "a", True)
    assert {p.record_id for p in choose_examples([*same, other], 2)} == {"a0", "b"}


def test_pictures_are_made_small():
    content = picture_uri(Image.new("RGBA", (2000, 500), "blue")).split(",", 1)[1]
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (448, 112)


def test_evaluation_survives_its_file(evaluation_factory, tmp_path):
    own = evaluation_factory()
    own.save(tmp_path / "sub" / "evaluation.json")
    assert EvaluationResult.load(tmp_path / "sub" / "evaluation.json") == own
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["evaluation.json"]


def test_layout_of_the_evaluation_file(evaluation_factory):
    """What other programs read."""
    data = json.loads(json.dumps(evaluation_factory().to_dict()))
    assert data["accuracy"] == 0.625
    assert data["tasks"]["colour"]["accuracy"] == 0.625
    assert data["tasks"]["colour"]["total"] == 8
    assert data["tasks"]["colour"]["interval"] == pytest.approx([0.306, 0.863], abs=1e-3)
    assert data["blind"]["variant"] == "grey"
    assert data["blind"]["tasks"]["count"]["accuracy"] == 0.125
    assert data["plan"]["name"] == "skip_ffn"


@pytest.mark.parametrize(
    "content", ["nonsense", "[]", '{"format_version": 9}', '{"format_version": 1, "checkpoint": 3}']
)
def test_bad_evaluation_files_are_named(content, tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"evaluation\.json"):
        EvaluationResult.load(path)


def test_metrics_files(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(DataError, match="no such file"):
        read_metrics(path)
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2,\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)
    path.write_text('{"step": 1, "loss": 2.0}\n')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def table(strategy="vig", factor=1.0):
    """Three layers, two samples of one task and one of another."""
    values = torch.tensor([[0.4, 0.2, 0.3], [0.03, 0.01, 0.5], [0.0, 0.0, 0.0]], dtype=torch.float64) * factor
    return ScoreTable(strategy, "zero", values, ("a", "b", "c"), ("colour", "colour", "count"))


@pytest.fixture
def folder(tmp_path):
    """A calibration's folder with everything in it."""
    path = tmp_path / "calibration"
    path.mkdir()
    point = Point(1, Estimate(0.1, 0.05, 0.2), Accuracy(0.5, 0.4, 0.6, 10), 0.9)
    curves = [Curve(name, (point,)) for name in ("V-Skip", "V-Skip random 0", "V-Skip random 1")]
    contents = {
        "vig": {"scores": [0.3, 0.18, 0.0], "layers": [2], "threshold": 0.1, "plan": "V-Skip"},
        "scores": table().to_dict(),
        "scores_vig_ffn": table("vig_ffn", 2.0).to_dict(),
        "seeds": {"scores": [[0.3, 0.2, 0.0], [0.4, 0.1, 0.0]], "layers": [[2], [2]]},
        "curves": {"curves": [curve.to_dict() for curve in curves]},
        "transfer": {
            "calibrated_on": ["colour", "universal"],
            "evaluated_on": ["colour"],
            "kl": [[0.1], [None]],
            "accuracy": [[0.5], [0.6]],
        },
    }
    for name, content in contents.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_a_calibration_shows_what_its_folder_holds(folder, evaluation_factory):
    calibration = read_calibration(folder)
    assert list(calibration.tables) == ["vig", "vig_ffn"]
    assert [curve.name for curve in calibration.curves] == ["V-Skip", "V-Skip random"]
    heads = ["Score per layer and task, MME", "Loss per layer", "Layers that skip", "Scores per layer over seeds"]
    heads += ["KL and accuracy over the number", "KL and accuracy over FLOPs", "Transfer, kl", "Transfer, accuracy"]

    inputs = ReportInputs("t", {}, evaluation_factory(), {}, {"MME": calibration}, examples=0)
    html = render_report(inputs, Pictures())
    pictures = [attrs["alt"] for tag, attrs in Page(html).tags if tag == "img"][1:]  # after the bars of the accuracy
    assert all(alt.startswith(head) for alt, head in zip(pictures, heads, strict=True))
    assert len(Page(html).links()) == 2 * (1 + len(heads))
    assert not re.search(r"https?://|@import|url\(", html)
    text = " ".join(" ".join(Page(html).text).split())
    assert "Scores of the 3 layers layer score colour count 0 3.00e-01" in text
    assert re.search(r"2 0\.00e\+00 0\.0e\+00 \S 0\.0e\+00 0\.00e\+00 0\.00e\+00 skipped", text)


def test_numbers_of_the_layers(folder):
    rows = layer_table(read_calibration(folder))["rows"]
    assert [row["score"] for row in rows] == ["3.00e-01", "1.80e-01", "0.00e+00"]
    assert rows[0]["tasks"] == ["3.00e-01", "3.00e-01"]  # (0.4 + 0.2) / 2 and 0.3
    assert rows[1]["tasks"] == ["2.00e-02", "5.00e-01"]
    assert rows[0]["interval"] == ["1.9e-01", "4.1e-01"]  # 0.3 and 1.96 * 0.1 / sqrt(3) on both sides
    assert [row["skipped"] for row in rows] == [False, False, True]


@pytest.mark.parametrize(
    ("tasks", "columns", "rows"),
    [
        (("", "", ""), [], ["all samples"]),
        (("b", "", "b"), ["b", "without a task"], ["b", "without a task", "all samples"]),
        (("b", "b", "b"), [], ["b"]),
    ],
)
def test_samples_without_a_task(folder, monkeypatch, tasks, columns, rows):
    (folder / "scores.json").write_text(json.dumps(replace(table(), tasks=tasks).to_dict()))
    drawn = []
    monkeypatch.setattr(calibration_report, "skip_map", lambda chosen, *_, **__: drawn.append(chosen) or Figure())
    shown = section("x", read_calibration(folder))
    assert shown["columns"] == ["layer", "score", *columns, ""]
    assert {tuple(chosen) for chosen in drawn[0].values()} == {tuple(rows)}
    if columns:
        assert shown["rows"][0]["tasks"] == ["3.50e-01", "2.00e-01"]  # (0.4 + 0.3) / 2, 0.2


def test_an_interval_is_shown_for_the_mean_over_samples_alone(folder):
    """The plan of a mean over tasks, (0.3 + 0.3) / 2 and (0.02 + 0.5) / 2, has scores of its own."""
    (folder / "vig.json").write_text('{"scores": [0.3, 0.26, 0.0], "layers": [2]}')
    assert [row["interval"] for row in layer_table(read_calibration(folder))["rows"]] == [[], [], []]


def test_a_profile_alone_is_enough(folder):
    calibration = read_calibration(folder / "vig.json")
    assert calibration == Calibration([0.3, 0.18, 0.0], [2], 0.1)
    shown = section("x", calibration)
    assert [figure["alt"] for figure in shown["figures"]] == ["Score per layer, x", "Layers that skip, by budget"]
    assert shown["columns"] == ["layer", "score", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vig.json", '{"scores": []}', "the field 'layers' is missing"),
        ("vig.json", "[1]", "not what a calibration writes"),
        ("scores.json", '{"strategy": "vig"}', "the field 'values' is missing"),
        (
            "scores_vig_ffn.json",
            json.dumps(table().to_dict() | {"values": [[1.0, 2.0, 3.0]]}),
            "3 layers and 3 samples",
        ),
        ("seeds.json", '{"scores": [[1, 2]], "layers": [[0]]}', "needs 3 scores"),
        ("scores.json", json.dumps(table("mine").to_dict()), "'mine' is unknown"),
        ("curves.json", '{"curves": [{"name": "V-Skip"}]}', "the field 'points' is missing"),
        ("transfer.json", '{"calibrated_on": ["a"], "evaluated_on": ["a"], "kl": [[1, 2]]}', "1 rows and 1 columns"),
    ],
)
def test_bad_calibration_files_are_named(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        read_calibration(folder)
    assert str(error.value).startswith(str(folder / name))


def test_a_folder_without_a_profile_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"vig\.json: no such file"):
        read_calibration(tmp_path)


@pytest.mark.parametrize(
    ("depth", "budgets"), [(32, [5, 10, 15, 20]), (12, [3, 6, 9]), (4, [1, 2, 3]), (3, [1, 2]), (2, [1]), (1, [])]
)
def test_budgets_fit_the_depth(depth, budgets):
    assert budgets_for(depth) == budgets


def test_layers_by_budget():
    scores = {"colour": [0.3, 0.1, 0.2, 0.0], "count": [0.0, 0.0, 0.2, 0.1]}
    chosen = skipped_by_budget(scores, [1, 3])
    assert chosen == {1: {"colour": (3,), "count": (0,)}, 3: {"colour": (1, 2, 3), "count": (0, 1, 3)}}


def test_calibrations_are_called_by_their_folders(evaluation_factory, tmp_path):
    evaluation_factory(blind=None, timing=None).save(tmp_path / "evaluation.json")
    folders = [tmp_path / "a" / "vskip", tmp_path / "b" / "vskip", tmp_path / "b" / "other"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "vig.json").write_text('{"scores": [0.0], "layers": [0]}')
    page = tmp_path / "report.html"
    paths = [str(folders[0]), str(folders[1]), str(folders[2] / "vig.json")]
    report.run(report.Config(output=str(page), evaluations=[str(tmp_path)], vig=paths, examples=0))
    names = re.findall(r"<h3[^>]*>(.*?)</h3>", page.read_text())
    assert names == [paths[0], paths[1], "other"]
