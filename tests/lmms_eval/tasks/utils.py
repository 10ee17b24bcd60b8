"""What the local tasks need beside their YAML; lmms-eval loads it from the tasks' folder."""

from PIL import Image


def visuals(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]


def no_visuals(doc):
    return []


def next_round(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=0, previous_round_info=None):
    """The text of the first round; for later ones what lmms-eval's protocol wants: five things."""
    if round_idx == 0:
        return doc["question"]
    seen = (previous_round_info or 0) + 1
    assert round_idx == len(previous_output) == seen
    ends = round_idx == doc["rounds"]
    return visuals(doc)[:1], f"You said {previous_output[-1]}. And now?", ends, list(previous_output), seen


def rounds_right(doc, results):
    answers = results[0]
    return {"rounds": float(len(answers) == doc["rounds"]), "last_right": float(answers[-1] == doc["answer"])}
