"""lmms-eval from its command line, with two processes that share the documents."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from skipvision_train.evaluation.metrics import exact_match


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def written(checkpoint, bank, tasks, tmp_path_factory):
    """What two processes wrote; a failed evaluation would exit with 0 as well, so the files are what counts."""
    out = tmp_path_factory.mktemp("out")
    command = f"""{sys.executable} -m torch.distributed.run --nproc_per_node=2 --master_port={free_port()} -m lmms_eval
        --model skipvision --model_args pretrained={checkpoint},bank={bank} --include_path {tasks}
        --tasks tiny_answers,tiny_choice,tiny_rounds --batch_size 3 --output_path {out} --log_samples"""
    settings = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command.split(), env=os.environ | settings, cwd=out, capture_output=True, text=True, check=False, timeout=600
    )
    results = list(out.rglob("*_results.json"))
    assert len(results) == 1, run.stdout[-3000:] + run.stderr[-3000:]
    return out, json.loads(results[0].read_text())


def outputs(out, task: str) -> list:
    """Of every document, in their order; an answer alone stands bare in the file."""
    lines = next(out.rglob(f"*_samples_{task}.jsonl")).read_text().splitlines()
    samples = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    assert [sample["doc_id"] for sample in samples] == list(range(7))
    return [sample["filtered_resps"] for sample in samples]


def test_two_ranks_answer_as_one(written, data, answered, rounds):
    out, results = written
    assert outputs(out, "tiny_answers") == answered["vskip"]
    assert outputs(out, "tiny_rounds") == rounds
    documents = json.loads((data / "answers.json").read_text())
    right = sum(exact_match(text, d["answer"]) for text, d in zip(answered["vskip"], documents, strict=True))
    scores = results["results"]
    assert scores["tiny_answers"]["exact_match,none"] == pytest.approx(right / 7)
    assert scores["tiny_rounds"]["rounds,none"] == 1


def test_two_ranks_score_choices_as_one(written, assistant, conversations, choices):
    out, results = written
    likelihoods = assistant.log_likelihoods(conversations, choices)
    picked = [max(range(3), key=lambda choice: row[choice].log_prob) for row in likelihoods]
    right = sum(choice == index % 3 for index, choice in enumerate(picked)) / len(picked)
    assert results["results"]["tiny_choice"]["acc,none"] == pytest.approx(right)
    for own, found in zip(likelihoods, outputs(out, "tiny_choice"), strict=True):
        values = [float(value) for value, _ in found]  # in the file they are text
        assert values == pytest.approx([-answer.log_prob for answer in own], rel=1e-4)
