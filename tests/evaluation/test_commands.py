"""evaluate, calibrate, generate and report, one after the other, on a tiny saved model."""

import json
import math
import re
from dataclasses import replace

import pytest

from skipvision_train.calibration.bank import PlanBank
from skipvision_train.cli import run_command
from skipvision_train.commands import calibrate, evaluate, generate, report
from skipvision_train.config.calibration import BudgetSpec, StrategySpec
from skipvision_train.config.plans import PlanSpec
from skipvision_train.errors import CheckpointError, ConfigError, DataError
from skipvision_train.evaluation.evaluate import predict
from skipvision_train.evaluation.results import EvaluationResult
from skipvision_train.models.identity import model_hash
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import VISUAL, SkipPlan, TokenKind, skip_ffn, vskip


@pytest.fixture
def settings(checkpoint, data, tmp_path):
    return {"checkpoint": str(checkpoint), "recipe": str(data / "recipe.yaml"), "data_root": str(data)}


def test_the_whole_road(settings, checkpoint, data, tmp_path, capsys):
    calibrate.run(
        calibrate.Config(**settings, output=str(tmp_path / "vskip"), samples=5, task="colour", budget=BudgetSpec(2))
    )
    text = capsys.readouterr().out
    assert len(re.findall(r"^ +\d+ +\d\.\d{4}e", text, flags=re.M)) == 3  # a line per layer
    assert text.count("  skipped\n") == 2

    plan = SkipPlan.load(tmp_path / "vskip" / "plan.json")
    vig = json.loads((tmp_path / "vskip" / "vig.json").read_text())
    assert plan.name == "skip_ffn + V-Skip"
    assert 2 in plan.layers_without_attention()  # the last layer is free
    assert plan.layers_without_attention() == tuple(vig["layers"])
    assert len(vig["layers"]) == 2
    assert plan.evict == skip_ffn().bind(3).evict
    assert all(TokenKind.SKIPPED in rule.no_ffn for rule in plan.rules)
    assert plan.rules[2].no_attention == VISUAL
    assert vig["scores"][2] == 0
    assert vig["scores"][vig["layers"][0]] <= max(vig["scores"])
    facts = plan.provenance
    assert facts["scores"] == vig["scores"]
    assert facts["model_hash"] == model_hash(SkipVisionForConditionalGeneration.from_pretrained(checkpoint))
    assert len(set(facts["records"])) == 5
    assert all(name.startswith("tiny/c") for name in facts["records"])
    assert (facts["seed"], facts["task"], facts["base_plan"]) == (0, "colour", "skip_ffn")
    assert (tmp_path / "vskip" / "vig.png").read_bytes().startswith(b"\x89PNG")

    own = evaluate.Config(**settings, output=str(tmp_path / "own"), blind=True, timing=True, timing_samples=1)
    evaluate.run(own)
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[:6]] == ["task", "colour", "count", "pair", "words", "mean"]
    skipping = evaluate.Config(
        **settings,
        output=str(tmp_path / "other"),
        plan=PlanSpec("file", path=str(tmp_path / "vskip" / "plan.json")),
        batch_size=5,
    )
    evaluate.run(skipping)
    result = EvaluationResult.load(tmp_path / "own" / "evaluation.json")
    other = EvaluationResult.load(tmp_path / "other" / "evaluation.json")
    assert result.plan == skip_ffn().bind(3)
    assert other.plan == plan
    assert set(result.timing) == {"dense", "plan"}
    assert other.blind is None
    assert other.cost.decoder_plan < result.cost.decoder_plan < result.cost.decoder_dense
    assert result.versions["torch"]

    page = tmp_path / "pages" / "report.html"
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n')
    report.run(
        report.Config(
            output=str(page),
            runs=[str(tmp_path / "sft")],
            evaluations=[str(tmp_path / "own"), str(tmp_path / "other" / "evaluation.json")],
            vig=[str(tmp_path / "vskip")],
            data_root=str(data),
            examples=5,
        )
    )
    html = page.read_text()
    assert html.count("<article") == 5
    with pytest.raises(DataError, match=r"no such image file; data_root=\.\.\. says"):
        report.run(report.Config(output=str(tmp_path / "none.html"), evaluations=[str(tmp_path / "own")]))
    assert "skip_ffn + V-Skip" in html
    assert [p.name for p in page.parent.iterdir()] == ["report.html"]


def test_evaluation_of_a_saved_model_is_that_of_the_model(settings, model, processor, records, data, tmp_path):
    evaluate.run(evaluate.Config(**settings, output=str(tmp_path / "e"), max_new_tokens=5))
    saved = EvaluationResult.load(tmp_path / "e" / "evaluation.json")
    assert list(saved.predictions) == predict(model, processor, records, 3, 5, root=data)


def test_calibration_is_reproducible(settings, tmp_path):
    plans = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        calibrate.run(calibrate.Config(**settings, output=str(tmp_path / name), samples=4, seed=seed))
        plans.append(SkipPlan.load(tmp_path / name / "plan.json"))
    assert plans[0].to_dict() == plans[1].to_dict()
    assert plans[0].provenance["records"] != plans[2].provenance["records"]
    assert len(plans[0].layers_without_attention()) == 1  # half of 3


def test_limit_draws_per_task(records):
    assert evaluate.limit_per_task(records, None, 0) == records
    few = evaluate.limit_per_task(records, 2, 0)
    assert [r.task for r in few] == ["colour"] * 2 + ["count"] * 2 + ["pair"] * 2 + ["words"] * 2
    assert evaluate.limit_per_task(records, 2, 0) == few
    assert any(evaluate.limit_per_task(records, 2, seed) != few for seed in range(1, 5))
    assert evaluate.limit_per_task(records, 100, 0) == records


def test_generate_prints_the_answer_alone(settings, model, processor, records, data, capsys):
    """Record c2 shows image 1.png; a prompt without a marker gets its image in front."""
    (expected,) = predict(model, processor, [records[2]], 1, 8)
    for prompt in ("Which colour has object 2?", "<image>\nWhich colour has object 2?"):
        generate.run(
            generate.Config(
                checkpoint=settings["checkpoint"],
                prompt=prompt,
                image=[str(data / "images" / "1.png")],
                max_new_tokens=8,
            )
        )
        assert capsys.readouterr().out == expected.output + "\n"


def test_generate_under_another_plan_and_with_a_system_message(settings, capsys):
    answers = []
    for extra in ({}, {"system": "Be brief."}):
        generate.run(
            generate.Config(
                checkpoint=settings["checkpoint"], prompt="Hello", plan=PlanSpec("dense"), max_new_tokens=8, **extra
            )
        )
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    ("command", "changes", "error", "message"),
    [
        (evaluate, {"checkpoint": "nowhere"}, CheckpointError, "nowhere is no model directory"),
        (evaluate, {"batch_size": 0}, ConfigError, "batch_size: 0"),
        (evaluate, {"limit": 0}, ConfigError, "limit: 0"),
        (evaluate, {"precision": "int8"}, ConfigError, "precision: 'int8'"),
        (evaluate, {"device": "abacus"}, ConfigError, "device: 'abacus'"),
        (evaluate, {"plan": PlanSpec("file", path="nothing.json")}, ConfigError, "no such plan file"),
        (calibrate, {"task": "smell"}, ConfigError, "there are colour, count, pair"),
        (calibrate, {"samples": 15}, ConfigError, "samples: 15"),
        (calibrate, {"budget": BudgetSpec(4), "samples": 2}, ConfigError, "budget.count: 4; the model has 3"),
        (calibrate, {"strategy": StrategySpec(bypass="one")}, ConfigError, "strategy.bypass: 'one'"),
    ],
)
def test_mistakes_are_named(command, changes, error, message, settings, tmp_path):
    values = {**settings, "output": str(tmp_path / "out"), **changes}
    with pytest.raises(error, match=message):
        command.run(command.Config(**values))
    assert not (tmp_path / "out").exists()


def test_results_of_another_configuration_are_kept(settings, tmp_path, capsys):
    cfg = evaluate.Config(**settings, output=str(tmp_path / "out"), limit=1, max_new_tokens=1)
    evaluate.run(cfg)
    before = (tmp_path / "out" / "evaluation.json").read_bytes()
    other = replace(cfg, limit=2, plan=PlanSpec("dense"))
    with pytest.raises(ConfigError, match=r"limit \(1 before, 2 now\), plan.method \(own before, dense now\);"):
        evaluate.run(other)
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == before
    evaluate.run(replace(cfg, batch_size=1))  # measured again
    evaluate.run(replace(other, overwrite=True))
    result = EvaluationResult.load(tmp_path / "out" / "evaluation.json")
    assert (len(result.predictions), result.plan.is_dense) == (8, True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"evaluation.json", "evaluate.run.json"}


def test_images_that_cannot_be_shuffled_are_noticed_before_the_model_is_loaded(settings, tmp_path):
    given = {**settings, "checkpoint": "nowhere", "output": str(tmp_path / "out")}
    with pytest.raises(DataError, match="task 'colour': images cannot be shuffled"):
        evaluate.run(evaluate.Config(**given, blind=True, limit=1))


def test_other_peoples_models_are_sent_to_bench(settings, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava", "vision_config": {}, "text_config": {}}')
    given = {**settings, "checkpoint": str(tmp_path), "output": str(tmp_path / "out")}
    with pytest.raises(CheckpointError, match=r"holds a model of transformers \(llava\); .* skipvision bench"):
        evaluate.run(evaluate.Config(**given))


def test_plan_of_another_depth(settings, tmp_path):
    vskip([1]).bind(5).save(tmp_path / "deep.json")
    spec = PlanSpec("file", path=str(tmp_path / "deep.json"))
    with pytest.raises(ConfigError, match="5 layers, the model has 3"):
        evaluate.run(evaluate.Config(**settings, output=str(tmp_path), plan=spec))


@pytest.mark.parametrize(
    "overrides", [["plan={file}"], ["plan=file", "plan.path={file}"], ["plan=vskip", "plan.layers=[1]"]]
)
def test_plans_on_the_command_line(settings, tmp_path, overrides):
    vskip([1]).save(tmp_path / "plan.json")
    overrides = [override.format(file=tmp_path / "plan.json") for override in overrides]
    given = [f"{key}={value}" for key, value in settings.items()]
    run_command("evaluate", [*given, f"output={tmp_path / 'out'}", "limit=2", *overrides])
    assert EvaluationResult.load(tmp_path / "out" / "evaluation.json").plan == vskip([1]).bind(3)


def test_a_bank_gives_every_record_its_tasks_plan(settings, model, tmp_path, capsys):
    """Tasks share batches in neither run; what counts is that each question saw its own plan."""
    given = [f"{key}={value}" for key, value in settings.items()]
    run_command(
        "calibrate", [*given, f"output={tmp_path / 'c'}", "bank=true", "samples=2", "budget=count", "budget.count=1"]
    )
    bank = PlanBank.load(tmp_path / "c" / "bank")
    bank = PlanBank.create(
        tmp_path / "c" / "bank", {**bank.plans, "colour": vskip([0, 1]).bind(3)}, bank.universal, bank.facts
    )
    run_command("evaluate", [*given, f"output={tmp_path / 'e'}", "plan=bank", f"plan.path={bank.path}"])
    mixed = EvaluationResult.load(tmp_path / "e" / "evaluation.json")
    for task in ("colour", "count"):
        overrides = ["plan=bank", f"plan.path={bank.path}", f"plan.task={task}"]
        run_command("evaluate", [*given, f"output={tmp_path / task}", *overrides])
        alone = EvaluationResult.load(tmp_path / task / "evaluation.json")
        assert alone.plan == bank.plan_for(task)
        own = [p.output for p in mixed.predictions if p.task == task]
        assert own == [p.output for p in alone.predictions if p.task == task]


def test_report_needs_something_to_report(tmp_path):
    with pytest.raises(ConfigError, match="evaluations: nothing to report"):
        report.run(report.Config(output=str(tmp_path / "r.html")))


def test_table_shows_percentages(settings, tmp_path, capsys):
    evaluate.run(evaluate.Config(**settings, output=str(tmp_path / "e"), max_new_tokens=1))
    result = EvaluationResult.load(tmp_path / "e" / "evaluation.json")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("count"))
    count = result.scores.tasks["count"]
    assert line.split() == [
        "count",
        "4",
        f"{100 * count.value:.1f}%",
        *f"{100 * count.low:.1f} to {100 * count.high:.1f}".split(),
    ]
    assert math.isclose(result.scores.mean.value, sum(a.value for a in result.scores.tasks.values()) / 4)
