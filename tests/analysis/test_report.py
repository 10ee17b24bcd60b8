"""The report: complete, self-contained, and safe whatever the data says."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from skipvision_train.analysis.report import (
    ReportInputs,
    choose_examples,
    picture_uri,
    read_metrics,
    read_profile,
    render_report,
)
from skipvision_train.errors import DataError
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
    return ReportInputs(
        "A title", LOSSES, own, {"V-Skip": other}, {"vskip": {"scores": [0.5, 0.1, 0.0], "layers": [2]}}
    )


def test_page_holds_every_picture_and_no_link_out(inputs):
    pictures = Pictures()
    html = render_report(inputs, pictures)
    page = Page(html)
    links = page.links()
    # Two losses, the bars and the profile in two themes each, and one picture per example.
    assert len(links) == 2 * 4 + 12
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


def test_metrics_and_profile_files(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(DataError, match="no such file"):
        read_metrics(path)
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2,\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)
    path.write_text('{"step": 1, "loss": 2.0}\n')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    (tmp_path / "vig.json").write_text('{"scores": []}')
    with pytest.raises(DataError, match="layers"):
        read_profile(tmp_path / "vig.json")
