"""Recipes: the ones that are shipped, sampling, and every way to write one wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from skipvision_train.data.recipes import ids_hash, load_recipe, load_records
from skipvision_train.errors import ConfigError, DataError
from skipvision_train.resources import resource_dir

SHIPPED = {"llava_558k": [""], "llava_665k": [""], "sketches": [":pretrain", ":sft", ":heldout"]}


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


def test_all_shipped_recipes_load(tmp_path, write_json, llava):
    folder = resource_dir("data_recipes")
    assert {path.stem for path in folder.glob("**/*.yaml")} == set(SHIPPED)
    (tmp_path / "images").mkdir()
    for name in ("blip_laion_cc_sbu_558k", "llava_v1_5_mix665k", "pretrain", "sft", "heldout"):
        write_json([llava("<image>\nq", name, image="x.jpg")], f"{name}.json")
    found = [load_recipe(name + split, tmp_path) for name, splits in SHIPPED.items() for split in splits]
    assert [recipe.name for recipe in found] == [
        *("llava_558k", "llava_665k", "sketches:pretrain", "sketches:sft", "sketches:heldout")
    ]
    assert [load_records(r)[0].turns[1].text for r in found[2:]] == ["pretrain", "sft", "heldout"]
    assert load_records(found[4])[0].images == (tmp_path / "images" / "x.jpg",)
    assert [recipe.sources[0].image_first for recipe in found] == [False, True, False, False, False]


def test_recipes_by_name_need_a_root():
    with pytest.raises(ConfigError, match=r"recipe 'llava_558k': data.root is needed"):
        load_recipe("llava_558k")
    with pytest.raises(ConfigError, match="recipe 'x': no such recipe; use one of llava_558k, llava_665k, sketches"):
        load_recipe("x", "/data")


def test_splits(tmp_path):
    with pytest.raises(ConfigError, match="no split was asked for; use one of sketches:pretrain, sketches:sft"):
        load_recipe("sketches", tmp_path)
    with pytest.raises(ConfigError, match="split 'test' was asked for"):
        load_recipe("sketches:test", tmp_path)
    with pytest.raises(ConfigError, match="has no splits, but 'sft' was asked for"):
        load_recipe("llava_558k:sft", tmp_path)


def test_without_root_paths_are_beside_the_recipe(root):
    path = root / "mine.yaml"
    path.write_text(yaml.safe_dump({"sources": [{"name": "one", "path": "data.json", "image_root": "images"}]}))
    records = load_records(load_recipe(path))
    assert [r.id for r in records] == [f"r{i}" for i in range(10)] + [f"s{i}" for i in range(10)]
    assert {r.source for r in records} == {"one"}
    assert records[-1].images == (root / "images" / "9.png",)


def test_take_a_number_or_a_share(recipe):
    ids = [r.id for r in load_records(recipe())]
    seven = [r.id for r in load_records(recipe(take=7))]
    assert len(seven) == len(set(seven)) == 7
    assert seven == sorted(seven, key=ids.index)  # file order
    assert seven != ids[:7]
    assert [r.id for r in load_records(recipe(take=0.35))] == seven
    assert set(seven) < {r.id for r in load_records(recipe(take=12))}
    assert len(load_records(recipe(take=1))) == 1
    assert len(load_records(recipe(take=1.0))) == 20
    assert len(load_records(recipe(take=0.001))) == 1
    with pytest.raises(DataError, match="source 'one' takes 21 records, the file has 20"):
        load_records(recipe(take=21))


def test_the_choice_depends_on_seed_and_name_alone(recipe, root):
    chosen = ids_hash(load_records(recipe(take=7)))
    assert chosen == ids_hash(load_records(recipe(take=7, seed=0)))
    renamed = [r.id for r in load_records(recipe(take=7, name="two"))]
    reseeded = [r.id for r in load_records(recipe(take=7, seed=1))]
    assert len({tuple(renamed), tuple(reseeded), tuple(r.id for r in load_records(recipe(take=7)))}) == 3
    code = (
        "import sys; from skipvision_train.data.recipes import *; "
        "sys.stdout.write(ids_hash(load_records(load_recipe(sys.argv[1], sys.argv[2]))))"
    )
    recipe(take=7)
    command = [sys.executable, "-c", code, str(root.parent / "mine.yaml"), str(root)]
    other = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5"})
    assert other.stdout == chosen


def test_repeat_and_image_first(recipe):
    once, thrice = load_records(recipe(take=5)), load_records(recipe(take=5, repeat=3))
    assert thrice == once * 3
    assert load_records(recipe(image_first=True))[10].turns[0].text == "<image>\nq"
    assert load_records(recipe())[10].turns[0].text == "q\n<image>"


def test_hash_sees_order_source_and_id(record, turns):
    a, b = record(turns("q", "a"), identity="1"), record(turns("q", "a"), identity="2")
    assert ids_hash([a, b]) == ids_hash([a, b])
    assert len({ids_hash(x) for x in ([a, b], [b, a], [a], [], [a, a])}) == 5


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ({"take": "None"}, "take is 'None'; use null, an integer"),
        ({"take": 0}, "take is 0"),
        ({"take": -2}, "take is -2"),
        ({"take": 1.5}, "take is 1.5"),
        ({"take": True}, "take is True"),
        ({"repeat": 0}, "repeat is 0; an integer of at least 1"),
        ({"repeat": 1.5}, "repeat is 1.5"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"max_malformed": -1}, "max_malformed is -1"),
        ({"image_first": "yes"}, "image_first is 'yes'; true or false"),
        ({"format": "parquet"}, "format 'parquet' is unknown; use llava"),
        ({"wieght": 2}, "unknown keys wieght; known are name, path"),
        ({"path": 3}, "path is 3; text is expected"),
        ({"name": ""}, "name is ''; text is expected"),
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
        ("sources: [{name: a, path: b}]", "source 0: image_root must be given"),
        ("splits: {a: 3}", "no split was asked for; use one of mine:a"),
        ("splits: 3", "use one of none"),
    ],
)
def test_wrong_files(tmp_path, text, error):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=error):
        load_recipe(tmp_path / "mine.yaml")


def test_missing_files(recipe, tmp_path):
    with pytest.raises(DataError, match=r"source 0 \(one\): no such data file: .*gone.json"):
        recipe(path="gone.json")
    with pytest.raises(DataError, match=r"no such image directory: .*gone"):
        recipe(image_root="gone")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "gone.yaml", tmp_path)


def test_names_are_unique(tmp_path, root):
    entry = {"name": "one", "path": "data.json", "image_root": "images"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"sources": [entry, entry]}))
    with pytest.raises(ConfigError, match="the source name 'one' occurs twice"):
        load_recipe(tmp_path / "mine.yaml", root)
