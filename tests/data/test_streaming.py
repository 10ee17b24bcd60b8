"""Streams: what is read, in which order, and that an order can begin anywhere, for any number of readers."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from itertools import chain, islice

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from skipvision_train.data import units
from skipvision_train.data.dataset import RecordDataset
from skipvision_train.data.json_files import JsonEntries
from skipvision_train.data.shards import TarEntries
from skipvision_train.data.sources import Source
from skipvision_train.data.streaming import StreamDataset, StreamShare
from skipvision_train.data.streams import Lane, Streams
from skipvision_train.data.units import LinesUnit, open_units
from skipvision_train.data.watch import WatchedDataset
from skipvision_train.errors import ConfigError, DataError


def entry(identity):
    turns = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "it"}]
    return {"id": str(identity), "messages": turns}


@pytest.fixture
def write_lines(tmp_path):
    """Files of JSON lines ``<name>-<n>.jsonl`` whose ids are ``<name>/<n>/<i>``."""

    def write(name, *counts, format="messages", **more):
        paths = []
        for number, count in enumerate(counts):
            path = tmp_path / f"{name}-{number}.jsonl"
            path.write_text("".join(json.dumps(entry(f"{name}/{number}/{i}")) + "\n" for i in range(count)))
            paths.append(str(path))
        return Source(name, tuple(paths), format=format, **more)

    return write


class Ids(Dataset):
    """The id of the record that a reference reads; the process that meets ``fatal`` is lost."""

    def __init__(self, fatal=None):
        self.fatal = fatal

    def __getitem__(self, reference):
        identity = reference.read().id
        if identity == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return identity


def stream(streams, start=0, workers=0, fatal=None, **share):
    share = {"lanes": 1, "rank": 0, "processes": 1, "per_device": 2, "global_batch": 4, "seed": 0, "buffer": 5} | share
    data = StreamDataset(streams, WatchedDataset(Ids(fatal), streams.where, workers), StreamShare(**share))
    data.step = start
    return data


def batches(streams, count, workers=0, **share):
    data = stream(streams, workers=workers, **share)
    loader = DataLoader(data, batch_size=data.share.per_device, num_workers=workers, collate_fn=list)
    return list(islice(loader, count))


def ids(streams, count, lane=0, lanes=1, skip=0, seed=0, buffer=5):
    references = streams.references(Lane(lane, lanes, seed, buffer), skip)
    return [reference.read().id for reference in islice(references, count)]


def test_unshuffled_records_come_as_they_are_listed_and_again(write_lines):
    streams = Streams.open("r", [write_lines("a", 3, 2)])
    listed = ["a/0/0", "a/0/1", "a/0/2", "a/1/0", "a/1/1"]
    assert ids(streams, 12, buffer=0) == (listed * 3)[:12]


def test_every_round_has_every_record_once_in_another_order(write_lines):
    streams = Streams.open("r", [write_lines("a", 7, 5, 9, 4)])
    seen = ids(streams, 75)
    rounds = [seen[:25], seen[25:50], seen[50:]]
    assert all(len(set(r)) == 25 for r in rounds)
    assert len({tuple(r) for r in rounds}) == 3
    assert len({tuple(ids(streams, 25, seed=seed)) for seed in range(4)}) == 4
    assert {x.split("/")[1] for x in rounds[0][:4]} == {rounds[0][0].split("/")[1]}  # still file by file


@pytest.mark.parametrize("lanes", [2, 4, 6])
def test_lanes_divide_a_round(write_lines, lanes):
    """By files; by records where there are fewer files than lanes."""
    streams = Streams.open("r", [write_lines("a", 12, 12, 12, 12)])
    each = [ids(streams, 48 // lanes, lane, lanes) for lane in range(lanes)]
    assert sorted(chain(*each)) == sorted(f"a/{n}/{i}" for n in range(4) for i in range(12))
    files = [{x.split("/")[1] for x in lane} for lane in each]
    assert [len(f) for f in files] == [4 // lanes if lanes <= 4 else 4] * lanes
    assert ("fewer than" in next(streams.lines(lanes))) == (lanes == 6)


@settings(max_examples=60)
@given(data=st.data())
def test_an_order_begins_anywhere(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("skip")
    sources = []
    for name in ("a", "b", "c")[: data.draw(st.integers(1, 3))]:
        paths = []
        for number, count in enumerate(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))):
            (path := folder / f"{name}{number}.jsonl").write_text(
                "".join(json.dumps(entry(f"{name}{number}{i}")) + "\n" for i in range(count))
            )
            paths.append(str(path))
        sources.append(Source(name, tuple(paths), format="messages", weight=data.draw(st.floats(0.2, 3))))
    streams = Streams.open("r", sources)
    buffer, lanes = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 3))
    lane, skip = data.draw(st.integers(0, lanes - 1)), data.draw(st.integers(0, 60))
    try:
        whole = ids(streams, 75, lane, lanes, buffer=buffer)
    except DataError:  # too few records for so many lanes
        return
    assert ids(streams, 75 - skip, lane, lanes, skip, buffer=buffer) == whole[skip:]


def test_sources_are_mixed_by_weight(write_lines):
    streams = Streams.open("r", [write_lines("a", 50, weight=3.0), write_lines("b", 50), write_lines("c", 50)])
    counts = Counter(x[0] for x in ids(streams, 10_000))
    # Three standard deviations of a binomial count of 10,000 are at most 150.
    assert [counts[name] / 10_000 for name in "abc"] == pytest.approx(streams.shares, abs=0.015)
    assert streams.shares == [0.6, 0.2, 0.2]


def test_skipping_far_is_counting(write_lines):
    """More draws than are made at once."""
    streams = Streams.open("r", [write_lines("a", 3), write_lines("b", 4, weight=0.5)])
    far = (1 << 16) + 10
    assert ids(streams, 20, skip=far - 15)[15:] == ids(streams, 5, skip=far)


def test_a_fraction_is_the_same_for_all_lanes_and_rounds(write_lines):
    streams = Streams.open("r", [write_lines("a", 200, 200, take=0.3)])
    kept = set(ids(streams, 400))
    assert 80 < len(kept) < 160
    assert {x for lane in range(8) for x in ids(streams, 100, lane, 8)} == kept


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")  # machines with fewer cores
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_workers_change_nothing_and_a_resumed_order_goes_on(write_lines, workers):
    streams = Streams.open("r", [write_lines("a", 7, 8, 9), write_lines("b", 5, weight=0.5)])
    alone = ids(streams, 24)
    expected = [alone[i : i + 2] for i in range(0, 24, 2)]
    assert batches(streams, 12, workers) == expected
    for step in (1, 3):  # two batches each
        assert batches(streams, 4, workers, start=step) == expected[2 * step : 2 * step + 4]


def test_batches_follow_the_runs_seed(write_lines):
    streams = Streams.open("r", [write_lines("a", *[6] * 8)])
    assert len({tuple(chain(*batches(streams, 6, seed=seed))) for seed in range(3)}) == 3


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_processes_change_no_step_where_lanes_stay(write_lines, processes):
    sources = [write_lines("a", *[6] * 16), write_lines("b", 40, 40)]

    def steps(processes):
        share = {"lanes": 8, "processes": processes, "global_batch": 16, "per_device": 2}
        each = [iter(stream(Streams.open("r", sources), start=3, rank=rank, **share)) for rank in range(processes)]
        return [sorted(x for one in each for x in islice(one, 16 // processes)) for _ in range(6)]

    assert steps(processes) == steps(1)


def test_no_process_reads_another_ones_shards(write_tar, tmp_path, monkeypatch):
    """Eight shards of known sizes and two processes; and a run that begins late opens none that it skips."""
    for n in range(8):
        write_tar(f"{n}.tar", {f"{n}{i}.json": json.dumps(entry(f"{n}/{i}")).encode() for i in range(10)})
    (tmp_path / "sizes.json").write_text(json.dumps({f"{n}.tar": 10 for n in range(8)}))
    source = Source("a", tuple(str(tmp_path / f"{n}.tar") for n in range(8)), format="messages")
    opened = []
    monkeypatch.setattr(units, "TarEntries", lambda paths: opened.append(paths[0].name) or TarEntries(paths))
    streams = Streams.open("r", [source])
    each = [ids(streams, 40, lane, 2) for lane in range(2)]
    assert len(opened) == len(set(opened)) == 8
    assert not set(each[0]) & set(each[1])
    opened.clear()
    assert ids(streams, 5, 0, 2, skip=35) == each[0][35:]
    assert len(opened) == 1


def test_a_shard_that_ends_where_the_run_begins_is_not_opened(write_tar, tmp_path, monkeypatch):
    for n in range(3):
        write_tar(f"{n}.tar", {f"{n}{i}.json": json.dumps(entry(f"{n}/{i}")).encode() for i in range(4)})
    (tmp_path / "sizes.json").write_text(json.dumps({f"{n}.tar": 4 for n in range(3)}))
    opened = []
    monkeypatch.setattr(units, "TarEntries", lambda paths: opened.append(paths[0].name) or TarEntries(paths))
    streams = Streams.open("r", [Source("a", tuple(str(tmp_path / f"{n}.tar") for n in range(3)), format="messages")])
    assert ids(streams, 4, skip=4, buffer=0) == [f"1/{i}" for i in range(4)]
    assert opened == ["1.tar"]


def test_known_sizes_skip_as_unknown_ones_do(write_tar, tmp_path):
    """Of a fraction of the records, too, and where lanes share shards."""
    for n in range(3):
        write_tar(f"{n}.tar", {f"{n}{i:02}.json": json.dumps(entry(f"{n}/{i}")).encode() for i in range(20)})
    source = Source("a", tuple(str(tmp_path / f"{n}.tar") for n in range(3)), format="messages", take=0.4)
    unknown = Streams.open("r", [source])
    (tmp_path / "sizes.json").write_text(json.dumps({f"{n}.tar": 20 for n in range(3)}))
    known = Streams.open("r", [source])
    for lane, lanes in ((0, 1), (1, 2), (3, 4)):
        whole = ids(unknown, 60, lane, lanes)
        for skip in (1, 7, 20, 45):
            assert ids(known, 60 - skip, lane, lanes, skip) == whole[skip:]


def test_a_shard_listed_as_empty_is_no_unit(write_tar, tmp_path):
    paths = [str(write_tar(name, {"0.json": json.dumps(entry(0)).encode()})) for name in ("a.tar", "b.tar")]
    (tmp_path / "sizes.json").write_text(json.dumps({"a.tar": 0, "b.tar": 1}))
    assert [unit.path for unit in open_units(paths)] == [paths[1]]


def test_a_unit_is_counted_once(write_lines, monkeypatch):
    """A late beginning reads files of unknown size in the first round alone, and then what it gives out."""
    streams, read = Streams.open("r", [write_lines("a", 3, 4)]), []
    entries = LinesUnit.entries
    monkeypatch.setattr(LinesUnit, "entries", lambda unit: read.append(unit.path.name) or entries(unit))
    ids(streams, 1, skip=70, buffer=0)
    assert read == ["a-0.jsonl", "a-1.jsonl", "a-0.jsonl"]


def test_rounds_and_blocks_have_orders_of_their_own(write_lines):
    streams = Streams.open("r", [write_lines("a", *[1] * 6)])
    files = ids(streams, 60, buffer=1)  # nothing but the files' order is shuffled
    assert len({tuple(files[start : start + 6]) for start in range(0, 60, 6)}) > 5
    one = Streams.open("r", [write_lines("b", 40)])
    places = [int(x.split("/")[2]) for x in ids(one, 40, buffer=8)]
    blocks = [places[start : start + 8] for start in range(0, 40, 8)]
    assert [sorted(block) for block in blocks] == [list(range(start, start + 8)) for start in range(0, 40, 8)]
    assert len({tuple(place % 8 for place in block) for block in blocks}) > 3
    assert ids(one, 40, skip=40, buffer=8) != ids(one, 40, buffer=8)


def test_images_are_moved_to_the_front_where_the_recipe_says_so(tmp_path):
    turns = [{"from": "human", "value": "Which?\n<image>"}, {"from": "gpt", "value": "it"}]
    (path := tmp_path / "a.jsonl").write_text(json.dumps({"id": "0", "image": "a.png", "conversations": turns}) + "\n")
    source = Source("a", (str(path),), image_root=tmp_path)
    texts = [
        Streams.open("r", [replace(source, image_first=first)]).first().read().turns[0].text for first in (False, True)
    ]
    assert texts == ["Which?\n<image>", "<image>\nWhich?"]


def test_links_out_of_the_image_root_are_followed_where_the_recipe_says_so(tmp_path, picture):
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "outside.png")
    (tmp_path / "images" / "a.png").symlink_to(tmp_path / "outside.png")
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "it"}]
    (path := tmp_path / "a.jsonl").write_text(json.dumps({"id": "0", "image": "a.png", "conversations": turns}) + "\n")
    source = Source("a", (str(path),), image_root=tmp_path / "images", follow_links=True)
    with Streams.open("r", [source]).first().read().images[0].open() as file:
        assert np.array_equal(np.array(Image.open(file)), np.array(picture()))
    with pytest.raises(DataError, match="follow_links: true"):
        Streams.open("r", [replace(source, follow_links=False)]).first().read().images[0].open()


def test_lanes_draw_their_sources_independently(write_lines):
    streams = Streams.open("r", [write_lines("a", 50), write_lines("b", 50)])
    drawn = [[x[0] for x in ids(streams, 100, lane, 2)] for lane in range(2)]
    assert 20 < sum(one != other for one, other in zip(*drawn, strict=True)) < 80


def test_a_lane_that_a_round_gives_nothing_goes_on(write_lines):
    """Eight files of a record, of which a fraction is taken, for four lanes."""
    streams = Streams.open("r", [write_lines("a", *[1] * 8, take=0.4)])
    kept = set(ids(streams, 30))
    assert 0 < len(kept) < 4  # so that in any round some lane has none
    assert {x for lane in range(4) for x in ids(streams, 20, lane, 4)} == kept


def test_another_checksum_is_refused(write_lines):
    source = write_lines("a", 3)
    with pytest.raises(DataError, match="checksum"):
        Streams.open("r", [replace(source, checksum=("0" * 64,))])


def test_files_of_several_kinds_are_refused(write_lines, tmp_path):
    with pytest.raises(ConfigError, match=r"files of several kinds \(jsonl, parquet\)"):
        open_units([*write_lines("a", 1).path, str(tmp_path / "b.parquet")])


@pytest.mark.parametrize("piece", [1, 7, 50, 131, 10_000])
def test_pieces_of_a_file_have_every_line_once(tmp_path, piece, monkeypatch):
    lines = [json.dumps(entry(i)) for i in range(9)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines[:4], "", "  ", *lines[4:]]).encode())
    monkeypatch.setattr(units, "PIECE", piece)
    found = [read() for unit in open_units([str(path)]) for read in unit.entries()]
    indexed = JsonEntries(path)
    assert found == [indexed.entry(i) for i in range(len(indexed))]
    assert [e["id"] for e in found] == [str(i) for i in range(9)]


def test_huge_lines_are_refused_one_by_one(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(entry(0)) + "\n" + " " * 3_000_000 + "x\n" + json.dumps(entry(2)))
    monkeypatch.setattr(units, "MAX_TEXT_BYTES", 1_000_000)
    first, second, third = LinesUnit(path, 0, path.stat().st_size).entries()
    assert (first()["id"], third()["id"]) == ("0", "2")
    with pytest.raises(DataError, match="3000002 bytes of JSON; at most 1000000"):
        second()


def test_a_line_of_exactly_the_most_is_read(tmp_path, monkeypatch):
    (path := tmp_path / "a.jsonl").write_text(json.dumps(entry(0)) + "\n")
    for most in (path.stat().st_size, path.stat().st_size - 1):
        monkeypatch.setattr(units, "MAX_TEXT_BYTES", most)
        (read,) = LinesUnit(path, 0, path.stat().st_size).entries()
        if most == path.stat().st_size:
            assert read()["id"] == "0"
        else:
            with pytest.raises(DataError, match=f"at most {most}"):
                read()


def test_space_behind_a_long_line_does_not_hide_it(tmp_path):
    line = json.dumps(entry(0)) + " " * (1 << 20)
    (path := tmp_path / "a.jsonl").write_text(line + "\n" + " " * (3 << 20) + "\n" + line)
    assert [read()["id"] for read in LinesUnit(path, 0, path.stat().st_size).entries()] == ["0", "0"]


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    (path := tmp_path / "a.jsonl").write_text(json.dumps(entry(0)) + "\n")
    size = path.stat().st_size
    (read,) = LinesUnit(path, 0, size).entries()
    os.truncate(path, size - 9)
    with pytest.raises(DataError, match=rf"{size - 9} of {size} bytes are there; the file was cut"):
        read()


def containers(tmp_path, write_tar):
    """The same twelve records in every container; of hub data sets only their files are there."""
    rows = [entry(i) for i in range(12)]
    half = [rows[:6], rows[6:]]
    for number, part in enumerate(half):
        write_tar(f"{number}.tar", {f"{e['id']}.json": json.dumps(e).encode() for e in part})
        folder = tmp_path / "hub"
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part), folder / f"train-{number}.parquet", row_group_size=4)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "disk")
    return {
        "tar": [tmp_path / "0.tar", tmp_path / "1.tar"],
        "parquet": [tmp_path / "hub" / "train-0.parquet", tmp_path / "hub" / "train-1.parquet"],
        "json": [tmp_path / "a.json"],
        "disk": [tmp_path / "disk"],
        "hub": [f"hub:{tmp_path / 'hub'}"],
    }


@pytest.mark.parametrize("kind", ["tar", "parquet", "json", "disk", "hub"])
def test_every_container_streams(tmp_path, write_tar, kind):
    paths = containers(tmp_path, write_tar)[kind]
    streams = Streams.open("r", [Source("a", tuple(map(str, paths)), format="messages")])
    assert ids(streams, 24, buffer=0) == [str(i) for i in range(12)] * 2
    whole = ids(streams, 24)
    assert sorted(whole[:12]) == sorted(map(str, range(12)))
    assert ids(streams, 9, skip=15) == whole[15:]
    lanes = [ids(streams, 6, lane, 2) for lane in range(2)]
    assert sorted(chain(*lanes)) == sorted(map(str, range(12)))


def test_units_are_shards_row_groups_and_files_of_the_hub(tmp_path, write_tar):
    found = {
        kind: [unit.records for unit in open_units([str(p) for p in paths])]
        for kind, paths in containers(tmp_path, write_tar).items()
    }
    assert found == {"tar": [None] * 2, "parquet": [4, 2, 4, 2], "json": [12], "disk": [12], "hub": [None] * 2}


def test_images_of_the_hub_keep_their_bytes(tmp_path, picture):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    (tmp_path / "hub").mkdir()
    rows = {"image": [picture(), picture(seed=1)], "caption": ["one", "two"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "hub" / "train.parquet")
    streams = Streams.open("r", [Source("a", (f"hub:{tmp_path / 'hub'}",), format="captions")])
    for reference, seed in zip(islice(streams.references(Lane(0, 1, 0, 0)), 2), (0, 1), strict=True):
        record = reference.read()
        assert np.array_equal(np.array(Image.open(record.images[0].open())), np.array(picture(seed=seed)))


def test_a_file_of_the_hub_that_breaks_is_named(tmp_path, write_tar):
    (location,) = containers(tmp_path, write_tar)["hub"]
    first, second = open_units([location])
    (tmp_path / "hub" / "train-1.parquet").write_bytes(b"no table" * 1000)
    assert len(list(first.entries())) == 6
    with pytest.raises(DataError, match=r"^hub:.*/hub: file 1 of 2 cannot be read: "):
        list(second.entries())


def test_a_broken_shard_is_as_many_unusable_records_as_it_is_listed_with(write_tar, tmp_path):
    good = write_tar("good.tar", {"0.json": json.dumps(entry("good")).encode()})
    bad = tmp_path / "bad.tar"
    bad.write_bytes(b"no tar" * 1000)
    streams = Streams.open("r", [Source("a", (str(good), str(bad)), format="messages")])
    for listed, count in ((None, 1), ({"good.tar": 1, "bad.tar": 3}, 3)):
        if listed:
            (tmp_path / "sizes.json").write_text(json.dumps(listed))
            streams = Streams.open("r", streams.sources)
        first, *rest = islice(streams.references(Lane(0, 1, 0, 0)), 1 + count)
        assert first.read().id == "good"
        for reference in rest:
            with pytest.raises(DataError, match=r"bad\.tar"):
                reference.read()


@pytest.mark.parametrize("more", [{"first": 3}, {"take": 3}, {"repeat": 2}])
def test_what_needs_an_index_is_refused(write_lines, more):
    key = next(iter(more))
    with pytest.raises(ConfigError, match=rf"^data\.streaming: source 'a' has {key}: \d, which needs an index"):
        Streams.open("r", [write_lines("a", 5, **more)])


def test_empty_sources_end_in_an_error(tmp_path, write_lines):
    empty = tmp_path / "e.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match=r"e\.jsonl: holds no records"):
        Streams.open("r", [Source("e", (str(empty),), format="messages")])
    empty.write_text("\n\n")
    with pytest.raises(DataError, match=r"e\.jsonl: source 'e' gives lane 0 no record"):
        ids(Streams.open("r", [Source("e", (str(empty),), format="messages")]), 1)
    with pytest.raises(DataError, match="gives lane 3 no record"):
        ids(Streams.open("r", [write_lines("a", 3)]), 1, 3, 4)


def test_a_number_names_its_record_in_another_process(write_lines, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "PIECE", 300)
    streams = Streams.open("r", [write_lines("a", 5), write_lines("b", 5, 20)])
    for lane in range(2):
        for reference in islice(streams.references(Lane(lane, 2, 0, 3)), 40):
            name = streams.where(int(reference))
            record = reference.read()
            assert name.startswith(str(tmp_path / record.id.rpartition("/")[0].replace("/", "-")) + ".jsonl: record ")
            assert streams.source_of(int(reference)).name == record.source
    with pytest.raises(TypeError, match="a stream has no index"):
        streams[3]


def test_a_lost_worker_is_reported_with_its_record(write_lines, tmp_path):
    streams = Streams.open("r", [write_lines("a", 6, 6)])
    data = stream(streams, workers=2, fatal="a/1/3")
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=list)
    with pytest.raises(DataError, match=rf"was lost while reading .*{tmp_path / 'a-1.jsonl'}: record 3 \(process"):
        data.samples.guard(lambda: list(islice(loader, 12)))


def test_the_policy_for_unusable_records_is_the_data_sets(write_lines, tmp_path, processor, caplog):
    source = write_lines("a", 6)
    lines = (tmp_path / "a-0.jsonl").read_text().splitlines()
    lines[2] = "{no json"
    (tmp_path / "a-0.jsonl").write_text("\n".join(lines))
    streams = Streams.open("r", [source])
    references = list(islice(streams.references(Lane(0, 1, 0, 0)), 12))
    with pytest.raises(DataError, match=r"a-0\.jsonl: record 2"):
        [RecordDataset(streams, processor)[reference] for reference in references]
    lenient = RecordDataset(streams, processor, on_error="skip", error_budget=1)
    assert [lenient[reference] is None for reference in references] == [i in (2, 8) for i in range(12)]
    assert lenient.skipped == 1  # the same record in two rounds
    assert caplog.text.count("left out record (1 so far): ") == 1
    strict = RecordDataset(streams, processor, on_error="skip", error_budget=0)
    with pytest.raises(DataError, match=r"1 records could not be used, data\.error_budget is 0"):
        strict[references[2]]


def test_manifests_tell_files_and_choices_apart(write_lines):
    hashes = {Streams.open("r", [write_lines("a", 5, **more)]).hash for more in ({}, {"take": 0.5}, {"weight": 2.0})}
    hashes |= {Streams.open("r", [write_lines("a", 6)]).hash}
    assert len(hashes) == 4
    manifest = Streams.open("r", [write_lines("a", 6), write_lines("b", 2, weight=3.0)]).manifest()
    assert [part["share"] for part in manifest["sources"]] == [0.25, 0.75]
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["streaming"] is True
