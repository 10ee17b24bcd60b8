"""Recipes: the ones that are shipped, sampling, and every way to write one wrong."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import yaml

from skipvision_train.data.formats import FORMATS
from skipvision_train.data.recipes import load_recipe, load_records
from skipvision_train.data.sources import Source, expand, fingerprint, select
from skipvision_train.errors import ConfigError, DataError
from skipvision_train.resources import resource_dir

SHIPPED = {"llava_558k": [""], "llava_665k": [""], "sketches": [":pretrain", ":sft", ":heldout"]}
MIXTURES = {"sv_1m", "sv_9m", "cos_65m"}

TABLE_7 = """
llava_665k svit | crepe imagenet_multitask vqa_rad | wikitable super_clevr vsr | viquae kvqa websrc
| chartqa iconqa infographicvqa | deepform tat_qa visualmrc docvqa sujet_finance | mathverse
| tqa hw_squad textvqa st_vqa textocr_gpt4v ocrbench_kv uber_text | ai2d
"""
TABLE_8 = """
svit allava sharegpt4v cogvlm_sft | textcaps sharegpt4o | crepe imagenet_multitask vqa_rad vqav2 vizwiz
| wikitable super_clevr vsr figureqa tallyqa visual_cot clevr raven
| viquae kvqa websrc okvqa volcano rlaif_v
| chartqa iconqa infographicvqa mapqa tabfact chart2text dvqa chartbench mmc
| deepform tat_qa visualmrc docvqa sujet_finance docmatix docreason25k docstruct4m
| mathverse mathocr mathv360k geogpt4v geo170k_qa
| tqa hw_squad textvqa st_vqa textocr_gpt4v ocrbench_kv uber_text ocr_vqa screenqa synthtext chromewriting k12_printing
squad icdar19_lsvt icpr18_mtwi icdar19_art coco_text docscan hiertext
| ai2d plotqa arxivqa scienceqa
"""
TASKS = [
    *("visual instruction tuning", "vqa", "visual reasoning", "knowledge", "chart, diagram, graph", "document", "math"),
    *("ocr, screen, scene text", "science"),
]
"""Of Table 7; Table 8 has ``caption`` behind the first."""


@pytest.fixture
def root(write_json, llava, tmp_path):
    """A data root with 20 records, half of them with an image."""
    entries = [llava("q", f"a{i}", id=f"r{i}") for i in range(10)]
    entries += [llava("q\n<image>", f"b{i}", id=f"s{i}", image=f"{i}.png") for i in range(10)]
    write_json(entries, "root/data.json")
    (tmp_path / "root" / "images").mkdir()
    return tmp_path / "root"


@pytest.fixture
def recipe(tmp_path, root):
    """Writes a recipe of one source over ``data.json``."""

    def make(**source):
        entry = {"name": "one", "path": "data.json", "image_root": "images"} | source
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({"sources": [entry]}))
        return load_recipe(path, root)

    return make


def ids(mixture):
    return [record.id for record in mixture]


# --- shipped recipes -----------------------------------------------------------------------------------------------


def shipped(name):
    return yaml.safe_load((resource_dir("data_recipes") / f"{name}.yaml").read_text())["sources"]


def test_all_shipped_recipes_load(tmp_path, write_json, llava):
    folder = resource_dir("data_recipes")
    assert {path.stem for path in folder.glob("**/*.yaml")} == {*SHIPPED, *MIXTURES}
    (tmp_path / "images").mkdir()
    for name in ("blip_laion_cc_sbu_558k", "llava_v1_5_mix665k", "pretrain", "sft", "heldout"):
        write_json([llava("<image>\nq", name, image="x.jpg")], f"{name}.json")
    found = [load_recipe(name + split, tmp_path) for name, splits in SHIPPED.items() for split in splits]
    assert [recipe.name for recipe in found] == [
        *("llava_558k", "llava_665k", "sketches:pretrain", "sketches:sft", "sketches:heldout")
    ]
    assert [load_records(r)[0].turns[1].text for r in found[2:]] == ["pretrain", "sft", "heldout"]
    assert load_records(found[4])[0].images[0].path == tmp_path / "images" / "x.jpg"
    assert [recipe.sources[0].image_first for recipe in found] == [False, True, False, False, False]
    assert [recipe.sources[0].follow_links for recipe in found] == [False, True, False, False, False]


@pytest.mark.parametrize(("name", "table"), [("sv_1m", TABLE_7), ("sv_9m", TABLE_8)])
def test_the_papers_mixtures_name_every_data_set_by_task(name, table):
    tasks = TASKS if name == "sv_1m" else [TASKS[0], "caption", *TASKS[1:]]
    groups = [group.split() for group in table.split("|")]
    expected = [(task, data) for task, group in zip(tasks, groups, strict=True) for data in group]
    assert [(entry["task"], entry["name"]) for entry in shipped(name)] == expected
    for entry in shipped(name):
        assert entry["public"], entry["name"]
        assert entry["format"] in FORMATS, entry["name"]


def test_the_papers_mixtures_agree_on_what_they_share():
    first = {entry["name"]: entry for entry in shipped("sv_1m")}
    second = {entry["name"]: entry for entry in shipped("sv_9m")}
    assert {name: second[name] for name in first if name in second} == {
        name: entry for name, entry in first.items() if name in second
    }


def test_a_big_mixture_lists_all_that_is_missing_at_once(tmp_path):
    for name in sorted(MIXTURES):
        local = [entry for entry in shipped(name) if not str(entry["path"]).startswith("hub:")]
        with pytest.raises(DataError) as caught:
            load_recipe(name, tmp_path)
        first, *lines = str(caught.value).splitlines()
        assert first.endswith(f"{name}.yaml: {len(local)} of {len(shipped(name))} sources are missing:")
        assert [line.split(":")[0].strip() for line in lines] == [entry["name"] for entry in local]
        assert all("(public: " in line for line in lines)


def test_pretraining_pairs_come_from_shards(tmp_path, write_tar):
    (entry,) = shipped("cos_65m")
    assert entry["format"] == "captions"
    for number, path in enumerate(expand(entry["path"])[:2]):
        write_tar(path, {f"{number}.jpg": b"jpg", f"{number}.txt": b"text"})
    with pytest.raises(DataError, match=r"pairs: .*/pairs/00002\.tar and 6497 more"):
        load_recipe("cos_65m", tmp_path)
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"sources": [entry | {"path": "pairs/{00000..00001}.tar"}]}))
    assert [(r.id, r.task, r.turns[1].text) for r in load_records(load_recipe(own))] == [
        ("0", "caption", "text"),
        ("1", "caption", "text"),
    ]


def test_recipes_by_name_need_a_root():
    with pytest.raises(ConfigError, match=r"recipe 'llava_558k': data.root is needed"):
        load_recipe("llava_558k")
    with pytest.raises(
        ConfigError, match="recipe 'x': no such recipe; use one of cos_65m, llava_558k, llava_665k, sketc"
    ):
        load_recipe("x", "/data")


def test_splits(tmp_path):
    with pytest.raises(ConfigError, match="no split was asked for; use one of sketches:pretrain, sketches:sft"):
        load_recipe("sketches", tmp_path)
    with pytest.raises(ConfigError, match="split 'test' was asked for"):
        load_recipe("sketches:test", tmp_path)
    with pytest.raises(ConfigError, match="has no splits, but 'sft' was asked for"):
        load_recipe("llava_558k:sft", tmp_path)


# --- choosing ------------------------------------------------------------------------------------------------------


def test_without_root_paths_are_beside_the_recipe(root):
    path = root / "mine.yaml"
    path.write_text(yaml.safe_dump({"sources": [{"name": "one", "path": "data.json", "image_root": "images"}]}))
    records = load_records(load_recipe(path))
    assert ids(records) == [f"r{i}" for i in range(10)] + [f"s{i}" for i in range(10)]
    assert {r.source for r in records} == {"one"}
    assert records[-1].images[0].path == root / "images" / "9.png"


def test_take_a_number_or_a_share(recipe):
    every = ids(load_records(recipe()))
    assert every == ids(load_records(recipe(take="all"))) == ids(load_records(recipe(take=None)))
    seven = ids(load_records(recipe(take=7)))
    assert len(seven) == len(set(seven)) == 7
    assert seven == sorted(seven, key=every.index)  # file order
    assert seven != every[:7]
    assert ids(load_records(recipe(take=0.35))) == seven
    assert set(seven) < set(ids(load_records(recipe(take=12))))
    assert len(load_records(recipe(take=1))) == 1
    assert len(load_records(recipe(take=1.0))) == 20
    assert len(load_records(recipe(take=0.001))) == 1
    assert ids(load_records(recipe(first=7))) == every[:7]
    for wrong in ({"take": 21}, {"first": 21}):
        with pytest.raises(DataError, match="source 'one' takes 21 records, there are 20"):
            load_records(recipe(**wrong))


def test_a_draw_is_fair():
    """Every index is drawn equally often: 200 names, 10 of 100, 20 expected per index with a deviation of 4.2."""
    drawn = Counter(int(i) for name in range(200) for i in select(Source(str(name), ("x",), take=10), 100).chosen)
    assert sum(drawn.values()) == 2000
    assert min(drawn[i] for i in range(100)) > 5
    assert max(drawn.values()) < 40


def test_the_choice_depends_on_seed_and_name_alone(recipe, root):
    def chosen(**source):
        return tuple(ids(load_records(recipe(take=7, **source))))

    assert chosen() == chosen(seed=0)
    assert len({chosen(name="two"), chosen(seed=1), chosen()}) == 3
    code = (
        "import sys, json; from skipvision_train.data.recipes import *; "
        "sys.stdout.write(json.dumps([r.id for r in load_records(load_recipe(sys.argv[1], sys.argv[2]))]))"
    )
    expected = list(chosen())
    command = [sys.executable, "-c", code, str(root.parent / "mine.yaml"), str(root)]
    other = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5"})
    assert json.loads(other.stdout) == expected


def test_a_draw_takes_the_smallest_hashes():
    """Against splitmix64 in Python's integers: no version of a library may change what is drawn."""

    def splitmix64(value):
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    seed = int.from_bytes(hashlib.sha256(b"3:golden").digest()[:8], "little")
    ranked = sorted(range(50), key=lambda i: splitmix64((seed + (i + 1) * 0x9E3779B97F4A7C15) % 2**64))
    assert select(Source("golden", ("x",), take=6, seed=3), 50).chosen.tolist() == sorted(ranked[:6])


def test_repeat_weight_and_image_first(recipe):
    once, thrice = load_records(recipe(take=5)), load_records(recipe(take=5, repeat=3))
    assert list(thrice) == list(once) * 3
    assert load_records(recipe(image_first=True))[10].turns[0].text == "<image>\nq"
    assert load_records(recipe())[10].turns[0].text == "q\n<image>"
    half = Counter(ids(load_records(recipe(take=8, weight=2.5))))
    assert sum(half.values()) == 20
    assert Counter(half.values()) == {2: 4, 3: 4}
    assert set(half) == set(ids(load_records(recipe(take=8))))
    few = ids(load_records(recipe(weight=0.2)))
    assert len(set(few)) == len(few) == 4
    assert few != ids(load_records(recipe(weight=0.2, seed=1)))
    assert len(load_records(recipe(weight=0.5, repeat=4))) == 40
    assert len(load_records(recipe(take=1, weight=0.001))) == 1


@pytest.mark.parametrize("options", [{}, {"take": 9}, {"first": 3, "repeat": 2}, {"take": 7, "weight": 2.4}])
def test_a_selection_is_the_list_of_its_positions(options):
    """Against the positions written out one by one."""
    selection = select(Source("s", ("x",), **options), 20)
    order = [selection[i] for i in range(len(selection))]
    values = np.arange(100, 120, dtype=np.int32)
    assert selection.spread(values).tolist() == [100 + i for i in order]
    begins = np.array([0, 4, 5, 13])
    group = [int(np.searchsorted(begins, i, side="right")) for i in order]
    rounds = [i // selection.distinct for i in range(len(order))]
    expected = [i for i in range(len(order)) if not i or (group[i], rounds[i]) != (group[i - 1], rounds[i - 1])]
    assert selection.starts(begins).tolist() == expected


# --- mixtures ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path, root, write_tar, write_json, llava):
    """Two sources: JSON with 20 records of which 4 are taken twice, and shards with 3 and 2."""

    def make(**first):
        write_tar("root/s-00.tar", {f"{i}.{kind}": b"x%d" % i for i in range(3) for kind in ("jpg", "txt")})
        write_tar("root/s-01.tar", {f"{i}.{kind}": b"x%d" % i for i in range(3, 5) for kind in ("jpg", "txt")})
        sources = [
            {"name": "one", "path": "data.json", "image_root": "images", "take": 4, "repeat": 2} | first,
            {"name": "two", "path": "s-{00..01}.tar", "format": "captions", "task": "caption", "public": "nowhere"},
        ]
        (tmp_path / "two.yaml").write_text(yaml.safe_dump({"sources": sources}))
        return load_records(load_recipe(tmp_path / "two.yaml", root))

    return make


def test_a_mixture_is_a_sequence(mixture):
    found = mixture()
    assert len(found) == 13
    assert [record.source for record in found] == ["one"] * 8 + ["two"] * 5
    assert found[:4] == found[4:8] == list(found)[:4]
    assert found[-1].turns[1].text == "x4"
    assert found[-1].task == "caption"
    assert [found.source_of(i).name for i in (0, 7, 8, 12, -1)] == ["one", "one", "two", "two", "two"]
    assert [found.locate(i) for i in (0, 7, 8, -1)] == [(0, 0), (0, 7), (1, 0), (1, 4)]
    for index in (13, -14):
        with pytest.raises(IndexError, match=f"record {index} of 13"):
            found[index]
    assert found.shards == (4, 4, 3, 2)
    assert sum(found.shards) == len(found)


def test_estimates_stand_in_the_order_of_the_records(mixture):
    found = mixture()
    assert [abs(found.size(i) - sum(len(t.text) for t in r.turns)) <= 8 for i, r in enumerate(found)] == [True] * 13
    assert found.image_counts.tolist() == [len(record.images) for record in found]
    assert found.images(9) == 1


def test_the_manifest_says_what_was_taken(mixture, root):
    manifest = mixture().manifest()
    json.dumps(manifest)
    one, two = manifest["sources"]
    assert (manifest["recipe"], manifest["records"]) == ("two", 13)
    assert (one["records"], one["chosen"], one["occurrences"], one["take"], one["repeat"]) == (20, 4, 8, 4, 2)
    assert (two["files"], two["records"], two["public"]) == (2, 5, "nowhere")
    assert two["path"] == [str(root / "s-00.tar"), str(root / "s-01.tar")]
    assert one["bytes"] == (root / "data.json").stat().st_size
    assert set(manifest["versions"]) == {"skipvision-train", "numpy", "pyarrow", "datasets", "pillow"}


def test_hashes_see_files_and_choices_alone(mixture, root, caplog):
    caplog.set_level("INFO")
    before = mixture().manifest()
    assert f"one: 4 of 20 records, 8 in an epoch, hash {before['sources'][0]['hash']}" in caplog.text
    assert mixture().manifest() == before

    def changed(**options):
        after = mixture(**options).manifest()
        assert after["sources"][1]["hash"] == before["sources"][1]["hash"]
        return after["hash"], after["sources"][0]["hash"]

    assert changed(note="a note") == (before["hash"], before["sources"][0]["hash"])
    found = [changed(seed=1), changed(repeat=3), changed(take=None), changed(weight=1.25), changed(image_first=True)]
    content = (root / "data.json").read_text()
    (root / "data.json").write_text(content.replace("r0", "rX"))
    found.append(changed())
    assert len({*found, (before["hash"], before["sources"][0]["hash"])}) == 7
    (root / "data.json").write_text(content)
    assert changed() == (before["hash"], before["sources"][0]["hash"])


def test_fingerprints_see_names_sizes_and_ends(tmp_path):
    path = tmp_path / "a"
    contents = [b"x" * 300_000, b"x" * 300_001, b"y" + b"x" * 299_999, b"x" * 299_999 + b"y"]
    prints = []
    for content in contents:
        path.write_bytes(content)
        prints.append(fingerprint([path]))
    assert len(set(prints)) == 4
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_bytes(contents[-1])
    assert fingerprint([tmp_path / "elsewhere" / "a"]) == prints[-1]


def test_reading_all_leaves_out_as_many_as_allowed(recipe, write_json, llava, caplog):
    write_json([llava("q", ""), llava("q", "a"), llava("q", " "), llava("q", "b")], "root/data.json")
    found = load_records(recipe(max_malformed=2))
    assert len(found) == 4
    assert [r.turns[1].text for r in found.read_all()] == ["a", "b"]
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    assert "data.json: record 2 (id 'a'): turn 1: the answer is empty" in caplog.text
    with pytest.raises(DataError, match=r"record 2 .*2 malformed records, 1 allowed"):
        load_records(recipe(max_malformed=1)).read_all()
    with pytest.raises(DataError, match=r"record 0 \(id 'a'\): turn 1: the answer is empty$"):
        load_records(recipe()).read_all()


def test_checksums(recipe, root):
    digest = hashlib.sha256((root / "data.json").read_bytes()).hexdigest()
    for given in (digest, f"sha256:{digest.upper()}", [digest]):
        assert len(load_records(recipe(checksum=given))) == 20
    with pytest.raises(DataError, match=r"data\.json: source 'one' expects the checksum 0{64}, found " + digest):
        load_records(recipe(checksum="0" * 64))
    with pytest.raises(ConfigError, match=r"\(one\): checksum is 'abc'; 64 hexadecimal digits"):
        recipe(checksum="abc")
    with pytest.raises(ConfigError, match="checksum: 2 for 1 files; one for each"):
        recipe(checksum=[digest, digest])
    with pytest.raises(ConfigError, match="checksum: a folder or a data set of the hub has none"):
        recipe(checksum=digest, path="hub:a/b")


# --- patterns ------------------------------------------------------------------------------------------------------


def test_patterns(tmp_path):
    assert expand("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expand("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    for name in ("x2", "x10", "y1"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/x*") == [f"{tmp_path}/x10", f"{tmp_path}/x2"]
    assert expand(f"{tmp_path}/z*") == [f"{tmp_path}/z*"]
    with pytest.raises(ConfigError, match="must run upwards"):
        expand("{5..2}")
    for many in ("{000000..999999}", "{0..999}{0..999}"):
        with pytest.raises(ConfigError, match="at most 100000"):
            expand(many)


def test_several_files_are_one_source(recipe, root, write_json, llava):
    write_json([llava("q", "a", id="t")], "root/more.json")
    assert ids(load_records(recipe(path=["more.json", "data.json"])))[:2] == ["t", "r0"]
    assert ids(load_records(recipe(path="{data,more}.json")))[-1] == "t"
    with pytest.raises(ConfigError, match="no container is known by that extension"):
        recipe(path="data.csv")
    (root / "a.tar").touch()
    both = recipe(path=["data.json", "a.tar"])
    with pytest.raises(ConfigError, match="files of several kinds"):
        load_records(both)


# --- wrong recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ({"take": "None"}, "take is 'None'; use null or all, an integer"),
        ({"take": 0}, "take is 0"),
        ({"take": -2}, "take is -2"),
        ({"take": 1.5}, "take is 1.5"),
        ({"take": True}, "take is True"),
        ({"take": 3, "first": 3}, "take and first are both given"),
        ({"first": 0}, "first is 0; an integer of at least 1"),
        ({"first": 0.5}, "first is 0.5"),
        ({"repeat": 0}, "repeat is 0; an integer of at least 1"),
        ({"repeat": 1.5}, "repeat is 1.5"),
        ({"weight": 0}, "weight is 0; a number above 0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"weight": float("inf")}, "weight is inf"),
        ({"weight": True}, "weight is True"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"max_malformed": -1}, "max_malformed is -1"),
        ({"image_first": "yes"}, "image_first is 'yes'; true or false"),
        ({"follow_links": 1}, "follow_links is 1; true or false"),
        ({"format": "parquet"}, "format 'parquet' is unknown; use one of llava, messages, cauldron"),
        ({"wieght": 2}, "unknown keys wieght; known are name, path"),
        ({"path": 3}, "path is 3; text or a list of texts is expected"),
        ({"path": []}, r"path is \[\]; text or a list"),
        ({"path": None}, "path is None; text or a list"),
        ({"path": "data.json.gz"}, r"\(one\): .*data\.json\.gz: compressed files cannot be read by index"),
        ({"name": ""}, "name is ''; text is expected"),
        ({"public": 3}, "public is 3; text is expected"),
    ],
)
def test_wrong_values_name_file_and_key(recipe, source, error):
    with pytest.raises(ConfigError, match=r"mine\.yaml: source 0.*" + error):
        recipe(**source)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("sources: [", "not YAML"),
        ("- a", "one key is expected, 'sources' or 'splits'; found list"),
        ("source: []", "found source"),
        ("sources: []", "a list of sources is expected"),
        ("sources: [3]", "source 0: a mapping is expected, found int"),
        ("sources: [{name: a}]", "source 0: path must be given"),
        ("splits: {a: 3}", "no split was asked for; use one of mine:a"),
        ("splits: 3", "use one of none"),
    ],
)
def test_wrong_files(tmp_path, text, error):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=error):
        load_recipe(tmp_path / "mine.yaml")


def test_missing_files(recipe, tmp_path):
    with pytest.raises(DataError, match=r"mine\.yaml: 1 of 1 sources are missing:\n  one: .*gone\.json$"):
        recipe(path="gone.json")
    with pytest.raises(DataError, match=r"one: .*gone\.json, image directory .*nowhere \(public: there\)$"):
        recipe(path="gone.json", image_root="nowhere", public="there")
    with pytest.raises(DataError, match=r"one: .*s-0\.tar and 2 more"):
        recipe(path="s-{0..2}.tar")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "gone.yaml", tmp_path)


def test_names_are_unique(tmp_path, root):
    entry = {"name": "one", "path": "data.json", "image_root": "images"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"sources": [entry, entry]}))
    with pytest.raises(ConfigError, match="the source name 'one' occurs twice"):
        load_recipe(tmp_path / "mine.yaml", root)
