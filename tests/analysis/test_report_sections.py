"""Training curves, analyses and benches in the report: what is there is shown, in both themes, and nothing else."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from skipvision_train.analysis.analysis_section import analysis_cards, read_analysis
from skipvision_train.analysis.report import ReportInputs, render_report
from skipvision_train.analysis.training_figures import lines, names_below, series_of, stacked, training_cards
from skipvision_train.commands import report
from skipvision_train.errors import ConfigError, DataError
from skipvision_train.evaluation.bench_results import BenchResult, Cost, Difference, Row
from skipvision_train.evaluation.metrics import accuracy
from skipvision_train.evaluation.timing import PlanTimes, Spread
from skipvision_train.plans import dense, vskip


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.alts: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.alts.append(dict(attrs)["alt"])

    def handle_data(self, data):
        self.words += data.split()

    @property
    def text(self):
        return " ".join(self.words)


def no_picture(path):
    raise AssertionError(path)


# --- training ------------------------------------------------------------------------------------------------------


ROWS = [
    {
        "step": step,
        "loss": 4.0 / step,
        "loss/a": 5.0 / step,
        "loss/b": None if step == 2 else 3.0,
        "lr/llm": 1e-3,
        "lr/vision": 1e-4,
        "grad_norm": 2.0,
        "grad_norm/llm": 1.0,
        "tokens/text": 100,
        "tokens/visual": 50,
        "tokens/padding": 0,
        "time/step": 0.5,
        "time/data": 0.1,
        "time/forward": 0.9,
        "samples_per_second": 20.0,
        "mfu": 0.4,
        "mfu_dense": 0.5,
        "skip/ffn": 0.3,
        "skip/attention": 0.0,
        "skip/flops": 0.2,
    }
    for step in (1, 2, 3)
]


def test_series_leave_out_what_is_null():
    assert series_of(ROWS, ["loss/b", "nothing"]) == {"loss/b": ([1, 3], [3.0, 3.0])}
    assert series_of(ROWS, ["mfu"], 100) == {"mfu": ([1, 2, 3], [40.0] * 3)}
    assert names_below(ROWS, "time") == ["time/step", "time/data", "time/forward"]


def test_every_group_of_metrics_has_a_figure():
    cards = training_cards("sft", ROWS)
    groups = ["Training loss", "loss per source", "learning rates", "gradient norms", "tokens", "time of a step"]
    groups += ["speed", "utilisation", "left out by the plan"]
    assert [card["alt"].removesuffix(" of sft") for card in cards] == groups
    assert all(card["light"] != card["dark"] for card in cards)


def test_a_run_of_another_version_shows_its_loss():
    assert len(training_cards("sft", [{"step": 1, "loss": 2.0}])) == 1
    one_source = [{"step": 1, "loss": 2.0, "loss/only": 2.0}]
    assert len(training_cards("sft", one_source)) == 1


def test_lines_and_stacks_hold_the_numbers():
    axes = lines(series_of(ROWS, ["grad_norm", "grad_norm/llm"]), "norm", log=True).axes[0]
    assert [line.get_label() for line in axes.lines] == ["grad_norm", "llm"]
    assert list(axes.lines[1].get_ydata()) == [1.0, 1.0, 1.0]
    assert axes.get_yscale() == "log"
    shares = series_of(ROWS, ["time/data", "time/forward"], 100)
    top = stacked(shares, "share").axes[0].collections[1].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(100)


def test_further_metrics_fold_away(evaluation_factory):
    page = Page(render_report(ReportInputs("t", {"one": ROWS, "two": [{"step": 1, "loss": 1.0}]}), no_picture))
    assert page.tags.count("details") == 1
    assert "Rates, gradients, tokens, time of one" in page.text
    assert page.alts[:2] == ["Training loss of one", "Training loss of two"]


# --- analyses ------------------------------------------------------------------------------------------------------


def analysis():
    estimate = {"mean": [0.5, 0.2], "low": [0.4, 0.1], "high": [0.6, 0.3]}
    partly = {"mean": [0.5, None], "low": [0.4, None], "high": [0.6, None]}
    share = {"flops": 1e9, "visual_ffn": 0.1, "text_ffn": 0.5, "projections": 0.3, "attention": 0.1}
    shares = [{"visual_tokens": n, **share} for n in (16, 64)]
    trace = {"sample": "s", "generated": ["a", "b"], "first_position": 2, "kinds": ["skipped"] * 3}
    return {
        "checkpoint": "m",
        "flops": {"geometry": "seven", "shares": shares},
        "ffn": {"plan": "own", "impact": {"text": estimate, "skipped": partly}},
        "similarity": [
            {"level": "window 2", "tokens": 9.0, "mean": 0.3, "histogram": [0] * 60 + [5, 7] + [0] * 38},
            {"level": "single", "tokens": 1.0, "mean": None, "histogram": [0] * 100},
        ],
        "attention": {
            "plan": "own",
            "evicted": False,
            "mass": {"text": {"mean": [0.7, 0.6]}, "skipped": {"mean": [0.3, 0.4]}},
            "samples": [{**trace, "rows": [[0.1, 0.2, 0.0], [0.3, 0.1, 0.2]]}],
        },
        "bound": {
            "plan": "own",
            "layers": [{"attention": 2.0, "ffn": 3.0}] * 2,
            "measured": {name: {"mean": [0.0, 0.5]} for name in ("whole", "text", "read", "skipping")},
            "log10_measured": [None, -0.5],
            "violations": 7,
            "log10_bound": [None, 2.0],
            "log10_bound_residual": [0.5, 3.0],
        },
    }


def test_every_part_of_an_analysis_is_drawn(tmp_path):
    (tmp_path / "analysis.json").write_text(json.dumps(analysis()))
    data = read_analysis(tmp_path)
    html = render_report(ReportInputs("t", {}, analyses={"mine": data}), no_picture)
    alts = [
        "Shares of FLOPs",
        "FFN impact per layer",
        "Similarity of visual tokens",
        "Attention mass per layer and kind",
    ]
    assert Page(html).alts == [*alts, "Attention map", "Error bound per layer"]
    assert "Inside the model" in Page(html).text


def test_the_similarities_density_is_that_of_the_histogram():
    card = next(card for card in analysis_cards(analysis()) if card.alt == "Similarity of visual tokens")
    values, means = card.data
    assert values == {"window 2 (9 tokens)": pytest.approx([0.21] * 5 + [0.23] * 7)}
    assert means == {"window 2 (9 tokens)": 0.3}


def test_the_error_stands_among_its_bounds():
    card = next(card for card in analysis_cards(analysis()) if card.alt == "Error bound per layer")
    assert card.data[0] == {"bound (Eq. 10)": [-math.inf, 2.0], "with residuals": [0.5, 3.0]}
    assert card.data[1] == [-math.inf, -0.5]
    assert card.caption.endswith("measured above it in 7 samples.")


def test_others_visual_tokens_are_called_so():
    card = next(card for card in analysis_cards(analysis()) if card.alt == "FFN impact per layer")
    assert card.data[2] == {"skipped": "visual"}


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"ffn": {}}', '{"attention": {"mass": {}, "evicted": 1, "plan": ""}}']
)
def test_other_files_are_no_analysis(content, tmp_path):
    (tmp_path / "analysis.json").write_text(content)
    with pytest.raises(DataError, match=r"analysis\.json: not what skipvision analyze writes"):
        read_analysis(tmp_path)


# --- benches -------------------------------------------------------------------------------------------------------


def made_row(name, plan, right, times):
    cost = Cost(2e9, 0.8, 2048.0, {"text": 3.0}, 1.0, 1.0)
    own = accuracy(right, 8)
    apart = Difference((right - 6) / 8, -0.5, 0.1)
    return Row(name, f"set {name}", plan.bind(3), own, {"a <b>": own}, apart, 0.25, cost, times, (1.0,) * 8)


@pytest.fixture
def result():
    spread = Spread(12.34, 10.0, 20.0)
    rows = (
        made_row("dense", dense(), 6, PlanTimes(spread, spread, spread, 1.0)),
        made_row("V & <i>", vskip([1]), 4, None),
    )
    return BenchResult({"device": "<d>"}, {"text": 4.0}, tuple((str(i), "a <b>") for i in range(8)), rows)


def test_a_bench_is_a_table_and_two_pictures(result, tmp_path):
    html = render_report(ReportInputs("t", {}, benches={"mine": result}), no_picture)
    page = Page(html)
    assert len(page.alts) == 2
    assert "50.0 21.5 to 78.5" in page.text  # Wilson's interval of 4 of 8
    assert "-25.0 -50.0 to +10.0" in page.text
    assert "80.0 % 2 GFLOPs" in page.text
    assert "2.0 KiB" in page.text
    assert "12.3 10 to 20" in page.text
    assert "V & <i> set V & <i>" in page.text
    assert "<i>" not in html
    assert not re.search(r"https?://|@import|url\(", html)


def test_the_command_takes_folders(result, tmp_path):
    result.save(tmp_path / "bench" / "bench.json")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "analysis.json").write_text(json.dumps(analysis()))
    page = tmp_path / "page.html"
    report.run(
        report.Config(
            output=str(page), bench=[str(tmp_path / "bench")], analysis=[str(tmp_path / "deep/analysis.json")]
        )
    )
    text = Page(page.read_text()).text
    assert "Plans side by side" in text
    assert "Inside the model" in text
    with pytest.raises(ConfigError, match="nothing to report"):
        report.run(report.Config(output=str(page)))
