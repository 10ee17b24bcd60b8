"""Asking a tiny model: batch sizes, blind variants, costs."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from skipvision_train.analysis import flops
from skipvision_train.analysis.image_flops import image_flops
from skipvision_train.data.images import load_image
from skipvision_train.data.records import ImageRef, Record, Turn
from skipvision_train.errors import DataError
from skipvision_train.evaluation.evaluate import (
    blind_scores,
    derange,
    file_images,
    grey_images,
    predict,
    sample_cost,
    shuffled_images,
)
from skipvision_train.evaluation.results import Scores
from skipvision_train.plans import TokenKind, dense, vskip


def told(records, predictions):
    """The records with the model's answers as right ones."""
    turns = [(*r.turns[:-1], Turn("assistant", p.output or "-")) for r, p in zip(records, predictions, strict=True)]
    return [replace(r, turns=t) for r, t in zip(records, turns, strict=True)]


def test_answers_do_not_depend_on_the_batch_size(model, processor, records):
    one = predict(model, processor, records, batch_size=1, max_new_tokens=6)
    assert len({p.output for p in one}) > len(records) / 2  # otherwise agreement would mean nothing
    for batch_size in (3, 14):
        assert predict(model, processor, records, batch_size, max_new_tokens=6) == one


def test_prompts_are_independent_of_the_answer(model, processor, records):
    other = [replace(r, turns=(*r.turns[:-1], Turn("assistant", "something else"))) for r in records]
    outputs = [[p.output for p in predict(model, processor, rows, 4, 6)] for rows in (records, other)]
    assert outputs[0] == outputs[1]


def test_earlier_turns_are_part_of_the_prompt(model, processor, records):
    """The last answer is asked for; what was said before it stands in the prompt as the data has it."""
    first, last = records[0].turns[0], Turn("user", "And which shape?")
    lengths = []
    for before in ("red", "blue"):
        turns = (first, Turn("assistant", before), last, Turn("assistant", "round"))
        (prediction,) = predict(model, processor, [replace(records[0], turns=turns)], 1, 6)
        assert (prediction.question, prediction.answer) == ("And which shape?", "round")
        lengths.append(prediction.tokens["text"])
    assert lengths[1] - lengths[0] == len("blue") - len("red")


def test_right_answers_are_counted_by_task(model, processor, records):
    first = predict(model, processor, records, 4, 6)
    own = told(records, first)
    own[0] = replace(own[0], turns=(*own[0].turns[:-1], Turn("assistant", "never said")))
    scores = Scores.of(predict(model, processor, own, 4, 6))
    said = Counter(p.task for p in first[1:] if p.output)
    assert {task: round(a.value * a.total) for task, a in scores.tasks.items()} == {
        task: said[task] for task in ("colour", "count", "pair", "words")
    }
    assert scores.mean.total == 14


def test_fields_of_a_prediction(model, processor, records, data):
    prediction = predict(model, processor, records, 8, 2, root=data)[10]
    assert (prediction.record_id, prediction.task, prediction.answer) == ("p0", "pair", "no")
    assert prediction.images == ("images/0.png", "images/7.png")
    assert prediction.question == "The same?"
    kinds = Counter(k.name.lower() for k in model.config.image_token_kinds())
    assert {k: v for k, v in prediction.tokens.items() if k != "text"} == {k: 2 * v for k, v in kinds.items()}


def test_images_that_are_no_files_have_no_names(model, processor, records):
    content = records[0].images[0].path.read_bytes()
    stored = replace(records[0], images=(ImageRef(Path("row 0"), data=content),))
    first, second = predict(model, processor, [records[0], stored], 1, 4)
    assert first.output == second.output
    assert (first.images, second.images) == ((str(records[0].images[0]),), ())
    assert first.tiles == second.tiles


def test_records_without_a_task_are_grouped_by_source(model, processor, records):
    (prediction,) = predict(model, processor, [replace(records[-1], task=None)], 1, 1)
    assert prediction.task == "tiny"


def test_the_image_matters_and_grey_removes_it(model, processor, records):
    seen = predict(model, processor, records, 8, 6)
    grey = predict(model, processor, records, 8, 6, grey_images(file_images(records)))
    different = [a.record_id for a, b in zip(seen, grey, strict=True) if a.output != b.output]
    assert len(different) >= 6
    assert not any(name.startswith("t") for name in different)


def test_grey_keeps_sizes(records):
    own, grey = file_images(records), grey_images(file_images(records))
    for index in range(len(records)):
        assert [i.size for i in own(index)] == [i.size for i in grey(index)]
        assert all(image.getextrema() == ((128, 128),) * 3 for image in grey(index))


@pytest.mark.parametrize("seed", range(20))
def test_derangement_has_no_fixed_point(records, seed):
    other = derange(records, seed)
    for record, index in zip(records, other, strict=True):
        shown = records[index]
        assert shown.task == record.task
        assert len(shown.images) == len(record.images)
        assert shown.images != record.images or not record.images
    # Two questions about one image get the same new one, and every image is shown.
    pictures = {record.images: records[index].images for record, index in zip(records, other, strict=True)}
    assert all(
        records[i].images == pictures[r.images] for r, i in zip(records, other, strict=True) if r.task == "colour"
    )
    singles = [r.images for r in records if r.task == "colour"]
    assert {records[i].images for i in other[:6]} == set(singles)


def test_derangement_follows_the_seed(records):
    assert derange(records, 3) == derange(records, 3)
    assert len({tuple(derange(records, seed)) for seed in range(20)}) > 1


def test_a_single_image_cannot_be_shuffled():
    same = [Record(str(i), "s", (ImageRef(Path("a.png")),), (), "colour") for i in range(3)]
    with pytest.raises(DataError, match="colour"):
        derange(same, 0)


def test_shuffled_images_come_from_the_other_record(records):
    source, other = shuffled_images(records, file_images(records), 5), derange(records, 5)
    for index in (0, 7, 10):
        for shown, path in zip(source(index), records[other[index]].images, strict=True):
            assert ImageChops.difference(shown, load_image(path, "")).getbbox() is None


def test_blind_is_the_better_variant(model, processor, records):
    own = file_images(records)
    by_variant = {}
    for name, source in (("grey", grey_images(own)), ("shuffled", shuffled_images(records, own, 0))):
        rows = told(records, predict(model, processor, records, 8, 6, source))
        blind = blind_scores(model, processor, rows, 8, 6, seed=0)
        by_variant[name] = blind
        assert blind.variant == name
        assert blind.scores.mean.value == blind.means[name] == max(blind.means.values())
    assert by_variant["grey"].means["shuffled"] < by_variant["grey"].means["grey"]


def test_cost_is_the_mean_over_prompts(model, processor, records):
    predictions = predict(model, processor, records, 8, 1)
    cost = sample_cost(model, predictions)
    text = model.config.text_config
    counts = [{TokenKind[k.upper()]: n for k, n in p.tokens.items()} for p in predictions]
    plan = [flops.sequence_flops(text, c, model.plan).total for c in counts]
    full = [flops.sequence_flops(text, c, dense().bind(3)).total for c in counts]
    assert cost.decoder_plan == pytest.approx(sum(plan) / 14)
    assert cost.decoder_dense == pytest.approx(sum(full) / 14)
    assert cost.decoder_plan < cost.decoder_dense
    assert cost.tokens["skipped"] == 5 * 14 / 14  # 10 single images and 2 pairs over 14 prompts, 5 tokens each
    assert cost.kv_bytes_dense - cost.kv_bytes_plan == pytest.approx(5 * 3 * 2 * 16 * 2)
    image = image_flops(model.config)
    assert (cost.vision, cost.connector) == pytest.approx((image.vision, image.connector + image.merging))
    with pytest.raises(ValueError, match="at least one"):
        sample_cost(model, [])


def test_plan_of_the_model_is_used(model, processor, records):
    own = [p.output for p in predict(model, processor, records[:10], 5, 6)]
    model.set_plan(vskip([0, 1]).bind(3))
    assert [p.output for p in predict(model, processor, records[:10], 5, 6)] != own


def test_half_precision_pixels(model, processor, records):
    assert len(predict(model.to(torch.bfloat16), processor, records[:2], 2, 2)) == 2


def test_unreadable_image_is_named(model, processor, records, data):
    (data / "images" / "4.png").write_text("no image")
    with pytest.raises(DataError, match=r"4\.png.*n1"):
        predict(model, processor, records, 8, 1)


def test_pictures_are_only_opened_when_asked_for(records, data):
    source = file_images(records)
    (data / "images" / "0.png").unlink()
    assert isinstance(source(6)[0], Image.Image)
