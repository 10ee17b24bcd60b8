"""Ask a model every question of a set of records, with the images or without, and score its answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image
from torch import Tensor

from skipvision_train.analysis import flops
from skipvision_train.analysis.image_flops import image_flops
from skipvision_train.data.collate import collate
from skipvision_train.data.images import load_image
from skipvision_train.data.processor import Example, SkipVisionProcessor
from skipvision_train.data.records import IMAGE_MARKER, ImageRef, Record
from skipvision_train.errors import DataError
from skipvision_train.evaluation.results import BlindScores, Prediction, SampleCost, Scores
from skipvision_train.evaluation.tasks import METRICS, Target, target_of
from skipvision_train.inference.decoding import Sampling, generate, on_device
from skipvision_train.inference.likelihood import answer_ids, continuation_likelihoods
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans.methods import dense
from skipvision_train.plans.rules import TokenKind

ImageSource = Callable[[int], list[Image.Image]]
"""The images of the record with that index, in the order of their markers."""

GREY = (128, 128, 128)


def file_images(records: Sequence[Record]) -> ImageSource:
    """The records' own images, decoded when asked for."""
    return lambda index: [load_image(image, records[index].id) for image in records[index].images]


def grey_images(images_of: ImageSource) -> ImageSource:
    """Every image replaced by a grey one of the same size: the prompt keeps its length and loses its content."""
    return lambda index: [Image.new("RGB", image.size, GREY) for image in images_of(index)]


def shuffled_images(records: Sequence[Record], images_of: ImageSource, seed: int) -> ImageSource:
    """Every record shown the images of another record of the same task with as many images.

    See :func:`derange`; a record without images stays as it is.
    """
    other = derange(records, seed)
    return lambda index: images_of(other[index])


def derange(records: Sequence[Record], seed: int) -> list[int]:
    """For every record the index of a record whose images it is shown instead: never one with the same images.

    Records of one task and number of images form a group. The distinct image sets of a group are permuted in a single
    random cycle (Sattolo's algorithm), so none keeps its place; questions about the same image get the same new one.

    Raises:
        DataError: a group has one image set only, naming the task.
    """
    rng = random.Random(f"{seed}/derange")
    groups: dict[tuple[str, int], dict[tuple[ImageRef, ...], list[int]]] = {}
    for index, record in enumerate(records):
        group = groups.setdefault((task_of(record), len(record.images)), {})
        group.setdefault(record.images, []).append(index)
    result = list(range(len(records)))
    for (task, images), members in groups.items():
        if not images:
            continue
        if len(members) < 2:
            raise DataError(f"task {task!r}: images cannot be shuffled, all {images}-image questions show the same one")
        order = list(members)
        for last in range(len(order) - 1, 0, -1):
            other = rng.randrange(last)
            order[last], order[other] = order[other], order[last]
        for own, shown in zip(members, order, strict=True):
            for index in members[own]:
                result[index] = members[shown][0]
    return result


def task_of(record: Record) -> str:
    """What a record's result is grouped by: its task, or its source's name."""
    return record.task or record.source


def prompt_batches(
    model: SkipVisionForConditionalGeneration,
    processor: SkipVisionProcessor,
    records: Sequence[Record],
    images_of: ImageSource,
    batch_size: int,
) -> Iterator[dict[str, Tensor]]:
    """Left-padded prompts up to the last answer, ``batch_size`` records at a time, on the model's device.

    Earlier answers of a record are part of its prompt, as they stand in the data.
    """
    for examples in _examples(processor, records, images_of, batch_size):
        yield _batch(model, processor, examples)


def _examples(
    processor: SkipVisionProcessor, records: Sequence[Record], images_of: ImageSource, batch_size: int
) -> Iterator[list[Example]]:
    for start in range(0, len(records), batch_size):
        chunk = range(start, min(start + batch_size, len(records)))
        yield [processor.encode_prompt(records[i].turns[:-1], images_of(i)) for i in chunk]


def _batch(
    model: SkipVisionForConditionalGeneration, processor: SkipVisionProcessor, examples: Sequence[Example]
) -> dict[str, Tensor]:
    return on_device(model, collate(examples, padding_side="left", pad_id=processor.pad_id))


def generate_answers(
    model: SkipVisionForConditionalGeneration,
    processor: SkipVisionProcessor,
    batch: Mapping[str, Tensor],
    max_new_tokens: int,
) -> list[str]:
    """The model's greedy answer to every row of a left-padded batch, without special tokens and outer white space."""
    answers = generate(model, batch, Sampling(max_new_tokens), [processor.end_id], processor.pad_id).tokens
    return [text.strip() for text in processor.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def likeliest_choices(
    model: SkipVisionForConditionalGeneration,
    processor: SkipVisionProcessor,
    examples: Sequence[Example],
    records: Sequence[Record],
    targets: Sequence[Target],
) -> list[str]:
    """Of every record's choices the one that is the likeliest answer to its prompt; of equal ones the first.

    Probabilities are those of the whole text, not per token, without the token that ends answers. No more rows than
    ``examples`` run at a time.
    """
    ids = [
        [answer_ids(processor, record.turns[:-1], example.image_tiles, choice) for choice in target.choices]
        for example, record, target in zip(examples, records, targets, strict=True)
    ]
    found = continuation_likelihoods(
        model,
        lambda rows: _batch(model, processor, [examples[row] for row in rows]),
        ids,
        processor.pad_id,
        len(examples),
    )
    best = [max(range(len(row)), key=lambda i, row=row: row[i].log_prob) for row in found]  # type: ignore[misc]
    return [target.choices[index] for target, index in zip(targets, best, strict=True)]


def predict(
    model: SkipVisionForConditionalGeneration,
    processor: SkipVisionProcessor,
    records: Sequence[Record],
    batch_size: int,
    max_new_tokens: int,
    images_of: ImageSource | None = None,
    root: Path | None = None,
) -> list[Prediction]:
    """Answer the last question of every record under the model's current plan, and score the answer.

    Answers are greedy, or the likeliest of the record's choices where its metric says so. Rows are padded on the left
    and positions follow the mask, so the answers do not depend on ``batch_size`` but for rounding in 16 bits.

    Args:
        model: in evaluation mode.
        processor: the model's.
        records: the last turn of each is the right answer.
        batch_size: records per forward pass.
        max_new_tokens: where an answer without an end is cut.
        images_of: what is shown; the records' own images by default.
        root: image paths in the result are relative to it, where they lie below it.

    Raises:
        ConfigError: an unknown metric.
        DataError: an image that cannot be read, or a record without what its metric needs.
    """
    shown, targets = images_of or file_images(records), [target_of(record) for record in records]
    predictions: dict[int, Prediction] = {}
    for by_likelihood in (False, True):
        rows = [i for i, target in enumerate(targets) if METRICS[target.metric].by_likelihood == by_likelihood]
        asked, wanted = [records[row] for row in rows], [targets[row] for row in rows]
        source = partial(_shown, shown, rows)
        made: list[Prediction] = []
        for examples in _examples(processor, asked, source, batch_size):
            part = slice(len(made), len(made) + len(examples))
            if by_likelihood:
                texts = likeliest_choices(model, processor, examples, asked[part], wanted[part])
            else:
                texts = generate_answers(model, processor, _batch(model, processor, examples), max_new_tokens)
            given = zip(texts, examples, asked[part], wanted[part], strict=True)
            made += [_prediction(*answered, root) for answered in given]
        predictions.update(zip(rows, made, strict=True))
    return [predictions[row] for row in range(len(records))]


def _shown(images_of: ImageSource, rows: Sequence[int], index: int) -> list[Image.Image]:
    return images_of(rows[index])


def _prediction(text: str, example: Example, record: Record, target: Target, root: Path | None) -> Prediction:
    verdict, counts = METRICS[target.metric].judge(text, target), Counter(example.token_kinds)
    return Prediction(
        record_id=record.id,
        task=task_of(record),
        images=_file_names(record, root),
        question=record.turns[-2].text.replace(IMAGE_MARKER, "").strip(),
        answer=record.turns[-1].text,
        output=text,
        score=verdict.score,
        tokens={k.name.lower(): counts[int(k)] for k in TokenKind if k != TokenKind.PAD and counts[int(k)]},
        tiles=example.image_tiles,
        metric=target.metric,
        category=target.category,
        group=target.group,
        read=verdict.read,
    )


def _file_names(record: Record, root: Path | None) -> tuple[str, ...]:
    """The images' paths, relative to ``root`` where they lie below it; none where one of them is no file of its own."""
    if not all(image.is_file for image in record.images):
        return ()
    paths = [image.path for image in record.images]
    return tuple(str(p.relative_to(root) if root is not None and p.is_relative_to(root) else p) for p in paths)


def blind_scores(
    model: SkipVisionForConditionalGeneration,
    processor: SkipVisionProcessor,
    records: Sequence[Record],
    batch_size: int,
    max_new_tokens: int,
    seed: int,
) -> BlindScores:
    """Scores without seeing: the better of grey and shuffled images, by the mean over tasks.

    Raises:
        DataError: images that cannot be shuffled (:func:`derange`).
    """
    own = file_images(records)
    variants = {"grey": grey_images(own), "shuffled": shuffled_images(records, own, seed)}
    scores = {
        name: Scores.of(predict(model, processor, records, batch_size, max_new_tokens, source), seed)
        for name, source in variants.items()
    }
    best = max(scores, key=lambda name: scores[name].mean.value)
    return BlindScores(best, scores[best], {name: score.mean.value for name, score in scores.items()})


def sample_cost(model: SkipVisionForConditionalGeneration, predictions: Sequence[Prediction]) -> SampleCost:
    """FLOPs and cache of a prefill under the model's plan, mean over the prompts of ``predictions``.

    Dense means here: the same tokens, with nothing skipped and nothing evicted.

    Raises:
        ValueError: no predictions.
    """
    if not predictions:
        raise ValueError("the cost of a sample needs at least one prediction")
    config: Any = model.config  # annotated as the base class in transformers
    text, plan = config.text_config, model.plan
    nothing_skipped = dense().bind(plan.num_layers)
    prompts = [{TokenKind[name.upper()]: n for name, n in p.tokens.items()} for p in predictions]
    images = [image_flops(config, tiles) for p in predictions for tiles in p.tiles]
    return SampleCost(
        tokens={k.name.lower(): fmean(p.get(k, 0) for p in prompts) for k in TokenKind if k != TokenKind.PAD},
        vision=sum(image.vision for image in images) / len(predictions),
        connector=sum(image.connector + image.merging for image in images) / len(predictions),
        lm_head=flops.lm_head_flops(text),
        decoder_dense=fmean(flops.sequence_flops(text, p, nothing_skipped).total for p in prompts),
        decoder_plan=fmean(flops.sequence_flops(text, p, plan).total for p in prompts),
        kv_bytes_dense=fmean(flops.kv_cache_bytes(text, p, nothing_skipped) for p in prompts),
        kv_bytes_plan=fmean(flops.kv_cache_bytes(text, p, plan) for p in prompts),
    )
