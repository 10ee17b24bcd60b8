"""Writes the embedded data set: image files, LLaVA-format JSON, a manifest, and the starting checkpoints."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from skipvision_train.errors import ConfigError, DataError
from skipvision_train.sketches.drawing import draw
from skipvision_train.sketches.questions import (
    CAPTION_REQUESTS,
    TASK_FAMILY,
    TASKS,
    Question,
    ask,
    caption,
    conversation,
)
from skipvision_train.sketches.scenes import Sketch, split_sketch
from skipvision_train.sketches.settings import DataSize, SketchSettings

log = logging.getLogger(__name__)

GENERATOR_VERSION = 1
"""Raised whenever the same settings would write other files."""

SPLITS = ("pretrain", "sft", "heldout")
FAMILY_TURNS = ("scene", "scene", "scene", "text", "chart")
"""Families take turns in the training splits; three of five images are scenes, which carry five of the seven tasks."""
MANIFEST = "manifest.json"
JPEG_QUALITY = 92
CHUNK = 250


def write_sketches(root: Path, settings: SketchSettings, processes: int) -> dict[str, Any]:
    """Write everything below ``root``, or find that it is there already.

    Files appear under a temporary name first; ``root`` exists only when it is whole.

    Args:
        root: folder to write: ``<split>.json``, ``images/``, ``start/llm``, ``start/vision``, ``manifest.json``.
        settings: what to write.
        processes: worker processes; they change nothing in the files.

    Returns:
        The manifest.

    Raises:
        ConfigError: ``root`` holds something else, or sketches of other settings; bad settings.
    """
    settings.check()
    if (found := read_manifest(root)) is not None:
        wanted = {"generator_version": GENERATOR_VERSION, "settings": asdict(settings)}
        if different := [key for key, value in wanted.items() if found.get(key) != value]:
            raise ConfigError(f"output: {root} holds sketches of other {' and '.join(different)}; use another folder")
        log.info("%s holds these sketches already", root)
        return found
    if root.exists() and any(root.iterdir()):
        raise ConfigError(f"output: {root} is not empty and holds no {MANIFEST}; use another folder")
    partial_root = root.with_name(root.name + ".partial")
    shutil.rmtree(partial_root, ignore_errors=True)
    partial_root.mkdir(parents=True)
    manifest = _write_all(partial_root, settings, processes)
    if root.exists():
        root.rmdir()
    partial_root.rename(root)
    return manifest


def read_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of a whole folder of sketches, or None.

    Raises:
        DataError: the file is there and is no JSON.
    """
    try:
        return json.loads((root / MANIFEST).read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise DataError(f"{root / MANIFEST}: not JSON: {error}") from error


def _write_all(root: Path, settings: SketchSettings, processes: int) -> dict[str, Any]:
    from skipvision_train.sketches.checkpoints import write_checkpoints

    splits = {}
    for split in SPLITS:
        records, digest = _write_split(root, split, settings.data, processes)
        text = json.dumps(records, ensure_ascii=False, indent=0)
        (root / f"{split}.json").write_text(text, encoding="utf-8")
        splits[split] = {
            "images": len(records),
            "questions": sum(len(record["conversations"]) // 2 for record in records),
            "tasks": dict(sorted(Counter(record["task"] for record in records if "task" in record).items())),
            "images_sha256": digest,
            "json_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        log.info("%s: %d images, %d questions", split, len(records), splits[split]["questions"])
    write_checkpoints(root / "start", settings.llm, settings.vision, settings.data.seed)
    manifest = {"generator_version": GENERATOR_VERSION, "settings": asdict(settings), "splits": splits}
    (root / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _write_split(root: Path, split: str, data: DataSize, processes: int) -> tuple[list[dict[str, Any]], str]:
    (root / "images" / split).mkdir(parents=True)
    count: int = getattr(data, split)
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    work = partial(_write_chunk, root / "images", split, data)
    records, digest = [], hashlib.sha256()
    for chunk_records, hashes in _map(work, chunks, processes):
        records += chunk_records
        for image_hash in hashes:
            digest.update(image_hash)
    return records, digest.hexdigest()


def _map(work: Any, chunks: list[range], processes: int) -> Iterator[tuple[list[dict[str, Any]], list[bytes]]]:
    """Results in the order of ``chunks``, whatever the number of processes."""
    if processes <= 1:
        yield from map(work, chunks)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(work, chunks)


def _write_chunk(images: Path, split: str, data: DataSize, indices: range) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Draw, save and describe some images of a split; also the SHA-256 of every image file."""
    records, hashes = [], []
    for index in indices:
        sketch, record = make_record(split, index, data.seed)
        path = images / record["image"]
        if path.suffix == ".jpg":
            draw(sketch, data.image_size).save(path, quality=JPEG_QUALITY, subsampling=0)
        else:
            draw(sketch, data.image_size).save(path, compress_level=1)
        hashes.append(hashlib.sha256(path.read_bytes()).digest())
        records.append(record)
    return records, hashes


def make_record(split: str, index: int, seed: int) -> tuple[Sketch, dict[str, Any]]:
    """Sketch and LLaVA record number ``index`` of a split; a pure function of its arguments."""
    rng = random.Random(f"{seed}/{split}/{index}")
    extra: dict[str, str] = {}
    if split == "heldout":
        task = TASKS[index % len(TASKS)]
        sketch, question = _asked_sketch(rng, split, task)
        turns, extra = [question], {"task": task}
    else:
        sketch = split_sketch(rng, FAMILY_TURNS[index % len(FAMILY_TURNS)], split)
        if split == "sft":
            turns = conversation(rng, sketch)
        else:
            turns = [Question("caption", rng.choice(CAPTION_REQUESTS), caption(rng, sketch))]
    image = f"{split}/{index:06d}.{'png' if index % 2 else 'jpg'}"
    return sketch, {"id": f"{split}-{index:06d}", "image": image, "conversations": _conversations(turns), **extra}


def _asked_sketch(rng: random.Random, split: str, task: str) -> tuple[Sketch, Question]:
    """A sketch of the split about which ``task`` has a question, and one such question."""
    while True:
        sketch = split_sketch(rng, TASK_FAMILY[task], split)
        if questions := ask(rng, sketch, task):
            return sketch, questions[0]


def _conversations(turns: list[Question]) -> list[dict[str, str]]:
    messages = []
    for number, turn in enumerate(turns):
        marker = "<image>\n" if number == 0 else ""
        messages.append({"from": "human", "value": marker + turn.text})
        messages.append({"from": "gpt", "value": turn.answer})
    return messages
