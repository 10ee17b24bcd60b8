"""Time and memory of opening a million records: ``python benchmarks/json_index.py [records] [folder]``.

Writes synthetic conversations (one to three turns, one record in 16 without an image) as JSON lines and as a JSON list,
opens each in a process of its own, and reads records in random order. Times are those of the processor, memory is the
peak of the process.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = "What do you see in this picture, and what would you say about the colours of it? " * 4
READS = 100_000


def entry(index: int) -> dict:
    """A conversation of the length that LLaVA's mixture has on average."""
    turns = []
    for turn in range(1 + index % 3):
        marker = "<image>\n" if not turn and index % 16 else ""
        turns += [
            {"from": "human", "value": marker + WORDS[: 40 + (index * 37) % 200]},
            {"from": "gpt", "value": WORDS[: 20 + (index * 91) % 280]},
        ]
    image = {"image": f"coco/train2017/{index:012d}.jpg"} if index % 16 else {}
    return {"id": f"{index:09d}", "conversations": turns} | image


def write(path: Path, records: int) -> None:
    """Line by line, as a list if the name ends in .json."""
    is_list = path.suffix == ".json"
    with path.open("w") as file:
        for index in range(records):
            file.write(("[" if not index else ",\n") if is_list else "")
            file.write(json.dumps(entry(index)) + ("" if is_list else "\n"))
        file.write("]" if is_list else "")


def measure(path: Path) -> None:
    """Open, estimate, read; a line each."""
    from skipvision_train.data.stores import RecordStore, open_entries

    def step(name: str, start: float) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"  {name:<30}{time.process_time() - start:8.2f} s   peak {peak:6.0f} MB")

    step("import", 0.0)
    start = time.process_time()
    store = RecordStore(open_entries([str(path)]), "llava", "benchmark", path.parent)
    step(f"open {len(store)} records", start)
    start = time.process_time()
    total = int(store.sizes.sum())
    step(f"sizes ({total / 1e6:.0f} MB of text)", start)
    start = time.process_time()
    images = int(store.image_counts.sum())
    step(f"images ({images})", start)
    generator, start = random.Random(0), time.process_time()
    for _ in range(READS):
        store[generator.randrange(len(store))]
    step(f"read {READS} at random", start)


def main() -> None:
    """Write once, measure each file in a process of its own."""
    if sys.argv[1:2] == ["--measure"]:
        return measure(Path(sys.argv[2]))
    records = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        for name in ("data.jsonl", "data.json"):
            path = Path(folder) / name
            write(path, records)
            print(f"{name}, {path.stat().st_size / 1e6:.0f} MB", flush=True)
            subprocess.run([sys.executable, __file__, "--measure", str(path)], check=True)
            path.unlink()
    return None


if __name__ == "__main__":
    main()
