"""The command line as a user meets it: help, suggestions, one-line errors, nothing left on the disk."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from skipvision_train import cli
from skipvision_train.config.reference import entries, schema_of
from skipvision_train.errors import ConfigError
from skipvision_train.resources import resource_dir


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command line in this process, in an empty folder: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["skipvision"])
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        out = capsys.readouterr()
        return stopped.value.code, out.out, out.err

    return run


@pytest.fixture
def seen(monkeypatch):
    """Replace training by a recorder of the configuration."""
    from skipvision_train.commands import train

    configs = []
    monkeypatch.setattr(train, "run", configs.append)
    return configs


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from skipvision_train.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'hydra'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, text in cli.COMMANDS.items():
        assert f"{name} " in done.stdout
        assert text in done.stdout


def test_module_and_script_are_the_same(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "skipvision_train", "trian"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: 'trian' is no command; did you mean 'train'?")
    assert "Traceback" not in done.stderr


def test_version(command):
    from skipvision_train import __version__

    assert command("--version") == (0, f"skipvision {__version__}\n", "")


@pytest.fixture
def checks(monkeypatch):
    """Replace ``data check`` by a recorder of the configuration."""
    from skipvision_train.commands import data_check

    configs = []
    monkeypatch.setattr(data_check, "run", configs.append)
    return configs


@pytest.mark.parametrize(
    ("arguments", "recipe", "workers"),
    [
        (["sketches:sft"], "sketches:sft", 4),
        (["mine/recipe.yaml", "workers=1"], "mine/recipe.yaml", 1),
        (["workers=1", "mine/recipe.yaml"], "mine/recipe.yaml", 1),
        (["recipe=sv_1m"], "sv_1m", 4),
        (["it's {here}, [there] (1).yaml"], "it's {here}, [there] (1).yaml", 4),
        (["--config-dir", ".", "sv_1m"], "sv_1m", 4),
    ],
)
def test_two_words_and_a_recipe(command, checks, arguments, recipe, workers):
    status, _, error = command("data", "check", *arguments)
    assert (status, error) == (0, "")
    assert [(cfg.recipe, cfg.workers) for cfg in checks] == [(recipe, workers)]


def test_two_word_commands_have_a_help(command, checks):
    status, out, _ = command("data", "check", "--help")
    assert status == 0
    assert out.startswith("skipvision data check: ")
    assert "usage: skipvision data check RECIPE [" in out
    assert "\n  error_budget=0\n" in out
    status, out, _ = command("data", "check", "sv_1m", "--cfg", "job")
    assert status == 0
    assert "recipe: sv_1m" in out
    assert checks == []


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_of_a_first_word_lists_its_commands(command, word):
    status, out, _ = command("data", word)
    assert status == 0
    assert "data check RECIPE" in out
    assert "data preview RECIPE" in out
    assert "calibrate" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data"], "error: 'data' needs a second word; commands are data check, data preview\n"),
        (["data", "--cfg", "job"], "error: 'data' needs a second word; "),
        (["data", "chekc"], "error: 'data chekc' is no command; did you mean 'data check'?; commands are data check,"),
        (["data", "sv_1m"], "error: 'data sv_1m' is no command; commands are data check, data preview\n"),
        (["check", "sv_1m"], "error: 'check' is no command; did you mean 'data check'?"),
        (["data check", "sv_1m"], "error: 'data check' is no command"),
        (["data", "check", "a", "b"], "error: data check takes one recipe, found a and b\n"),
        (["data", "check", "a", "recipe=b"], "error: data check takes one recipe, found a and recipe=b\n"),
        (["data", "check"], "error: recipe: needs a value; "),
    ],
)
def test_mistakes_in_two_words(command, checks, arguments, message):
    status, out, error = command(*arguments)
    assert (status, out) == (1, "")
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert checks == []


def test_config_becomes_the_dataclass(command, seen):
    status, _, error = command("train", "experiment=sv_cos", "trainer.seed=7", "model.reducer.local_keep=128")
    assert (status, error) == (0, "")
    (cfg,) = seen
    assert type(cfg).__name__ == "TrainConfig"
    assert cfg.trainer.seed == 7
    assert cfg.model.reducer.local_keep == 128
    assert cfg.model.connector["queries"] == [16, 256, 1024]
    assert cfg.deepspeed.stage == 3


def test_dry_run_flag_is_an_override(command, seen):
    command("train", "--dry-run")
    command("train")
    assert [cfg.dry_run for cfg in seen] == [True, False]


def test_nothing_is_left_behind(command, seen, tmp_path):
    command("train", "experiment=sv_cos")
    assert list(tmp_path.iterdir()) == []


def test_multirun_runs_every_job(command, seen):
    status, _, error = command(
        "train", "--multirun", "trainer.seed=1,2", "trainer.output_dir='outputs/${trainer.seed}'"
    )
    assert (status, error) == (0, "")
    assert [(cfg.trainer.seed, cfg.trainer.output_dir) for cfg in seen] == [(1, "outputs/1"), (2, "outputs/2")]


def test_own_config_directory(command, seen, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "half.yaml").write_text(
        "# @package _global_\ndefaults:\n  - sv_cos\n\ntrainer:\n  global_batch: 64\n"
    )
    status, _, error = command("train", "--config-dir", "mine", "experiment=half")
    assert (status, error) == (0, "")
    assert seen[0].trainer.global_batch == 64
    assert seen[0].trainer.output_dir == "outputs/sv_cos"


def test_cfg_job_prints_the_configuration(command, seen):
    status, out, _ = command("train", "experiment=cos_pretrain", "--cfg", "job")
    assert status == 0
    assert "image_size: 224" in out
    assert seen == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_explains_every_field_without_a_heavy_import(name):
    script = (
        "import sys\n"
        "from skipvision_train.cli import main\n"
        f"try: main({[*name.split(), '--help']!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'hydra', 'datasets', 'matplotlib', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"skipvision {name}: {cli.COMMANDS[name]}\n\nusage: ")
    shown = {line.split("=")[0].strip() for line in result.stdout.splitlines() if line.startswith("  ") and "=" in line}
    assert {entry.path for entry in entries(schema_of(name))} <= shown


@pytest.mark.parametrize(
    "text",
    [
        "What's there?",
        "Red, or blue?",
        "a: [b] {c} (d)",
        'say "no"',
        "C:\\",
        "it\\'s",
        "${oc.env:HOME} = x",
        "two\nlines",
        "",
        "'",
        "5",
        "true",
    ],
)
def test_what_people_write_needs_no_quotes(command, monkeypatch, text):
    from skipvision_train.commands import generate

    configs = []
    monkeypatch.setattr(generate, "run", configs.append)
    status, _, error = command("generate", "checkpoint=c", f"prompt={text}", f"system={text}")
    assert (status, error) == (0, "")
    assert (configs[0].prompt, configs[0].system) == (text, text)


@pytest.mark.parametrize(("given", "found"), [("'Red, or blue?'", "Red, or blue?"), ('"a: b"', "a: b"), ("null", None)])
def test_what_is_quoted_already_stays(command, monkeypatch, given, found):
    from skipvision_train.commands import generate

    configs = []
    monkeypatch.setattr(generate, "run", configs.append)
    assert command("generate", "checkpoint=c", f"system={given}")[0] == 0
    assert configs[0].system == found


def test_a_reader_that_has_seen_enough_is_no_error():
    program = f"{sys.executable} -m skipvision_train train --help"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {program} | head -1"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("skipvision train: ")


def test_hydra_settings_can_be_overridden(command, seen, tmp_path):
    command("train", "hydra.run.dir=elsewhere", "hydra.output_subdir=hydra")
    assert (tmp_path / "elsewhere" / "hydra" / "config.yaml").is_file()


@pytest.mark.parametrize("spelling", ["--local_rank=3", "--local-rank=3"])
def test_local_rank_of_the_launcher(command, seen, monkeypatch, spelling):
    monkeypatch.setenv("LOCAL_RANK", "placeholder")  # registers the variable for restoring
    monkeypatch.delenv("LOCAL_RANK")
    status, _, error = command(spelling, "train", "trainer.seed=5")
    assert (status, error) == (0, "")
    assert os.environ["LOCAL_RANK"] == "3"
    assert seen[0].trainer.seed == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_stps=3", "error: trainer.max_stps: no such field; did you mean 'max_steps'"),
        ("trainr.seed=3", "error: trainr: no such field; did you mean 'trainer'?"),
        ("trainer.max_steps=soon", "error: trainer.max_steps: Value 'soon' of type 'str' could not be converted"),
        ("model.connector.window=16", "error: model.connector.window: "),
        ("model=sv_coz", "error: model: no configuration named 'sv_coz'; did you mean 'sv_cos'"),
        ("experimnt=sv_cos", "error: experimnt: "),
        ("data.recipe=???", "error: data.recipe: needs a value; give it as data.recipe=..."),
        ("nonsense", "error: nonsense: "),
        ("a=[1", "error: a=[1: "),
        ("model.vision.depths=16", "error: model.vision.depths: 16 is no list; write 'model.vision.depths=[16]'"),
        ("plan=./found", "error: plan: ./found is a folder; name a plan file in it, plan=./found/FILE.json"),
        ("plan=found/best", "error: plan: found/best is a folder; name a plan file in it, plan=found/best/plan.json"),
    ],
)
def test_mistakes_are_one_line(command, seen, tmp_path, override, message):
    (tmp_path / "found/best").mkdir(parents=True)
    (tmp_path / "found/best/plan.json").write_text("{}")
    status, out, error = command("train", override)
    assert status == 1
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert out == ""
    assert seen == []


@pytest.mark.parametrize("key", ["deepspeed", "experiment", "adapters@stage.lora"])
def test_null_leaves_a_group_out(command, seen, key):
    status, _, error = command("train", "experiment=table2/sv_cos", "adapters@stage.lora=lora", f"{key}=null")
    assert (status, error) == (0, "")
    (cfg,) = seen
    assert (cfg.deepspeed is None) == (key != "adapters@stage.lora")
    assert (cfg.stage.lora is None) == (key == "adapters@stage.lora")


@pytest.mark.parametrize(("order", "stage"), [(("zero2", "null"), None), (("null", "zero2"), 2)])
def test_the_last_word_on_a_group_counts(command, seen, order, stage):
    command("train", "experiment=sv_cos", *(f"deepspeed={choice}" for choice in order))
    assert [cfg.deepspeed and cfg.deepspeed.stage for cfg in seen] == [stage]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["model=null"],
            "model: null is no file of conf/model, and it cannot be left out; use one of cos_336, cos_dense",
        ),
        (["data=null"], "data: null is no file of conf/data, and it cannot be left out; use one of llava_558k, "),
        (["connector@model.connector=null"], "connector@model.connector: null is no file of conf/connector, and "),
        (["experiment=3"], "experiment: 3 is no file of conf/experiment, and experiment=null leaves it out; use one "),
        (["experiment="], "experiment: '' is no file of conf/experiment, and "),
        (
            ["deepspeed=false"],
            "deepspeed: false is no file of conf/deepspeed, and deepspeed=null leaves it out; use one",
        ),
        (["--multirun", "deepspeed=null,zero2"], "deepspeed: null beside other choices; leave deepspeed out in a run "),
        (["--multirun", "deepspeed=zero2,3"], "deepspeed: 3 is no file of conf/deepspeed"),
    ],
)
def test_what_no_group_can_be(command, seen, arguments, message):
    status, _, error = command("train", *arguments)
    assert (status, seen) == (1, [])
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_null_is_what_a_group_of_another_command_may_be(command, checks):
    assert command("data", "check", "sv_1m", "model=null", "plan=null")[0] == 0
    assert checks[0].model is None


@pytest.mark.parametrize("choice", ["table5/5_sf_ls_lv", "table5", "sv_llava/100", "5_sf_ls_lv"])
def test_a_wrong_row_of_a_table(command, seen, choice):
    status, _, error = command("train", f"experiment={choice}")
    assert (status, seen) == (1, [])
    assert error.startswith(f"error: experiment: no configuration named '{choice}'")
    assert error.count("\n") == 1
    rows = {f"table5/{file.stem}" for file in (resource_dir("conf") / "experiment/table5").iterdir()}
    listed = set(error.strip().rpartition(" has ")[2].split(", "))
    if choice.startswith("table5"):
        assert listed == rows
    if choice.endswith("5_sf_ls_lv"):
        assert "; did you mean 'table5/05_sf_ls_lv'" in error
    if choice == "sv_llava/100":
        assert "and no folder sv_llava; did you mean 'sv_llava' or " in error
        assert " has " not in error


def test_files_of_a_folder_of_ones_own_are_known(command, seen, tmp_path):
    (tmp_path / "mine/experiment/rows").mkdir(parents=True)
    (tmp_path / "mine/experiment/rows/first.yaml").write_text("# @package _global_\n")
    for arguments in (["--config-dir", "mine"], ["--config-dir=mine"]):
        status, _, error = command("train", *arguments, "experiment=rows/firts")
        assert (status, seen) == (1, [])
        assert error == (
            "error: experiment: no configuration named 'rows/firts'; did you mean 'rows/first'?; "
            "experiment/ has rows/first\n"
        )


def test_a_typo_in_a_file_names_the_field(command, seen, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "bad.yaml").write_text("# @package _global_\nstage:\n  warmup_ration: 0.1\n")
    status, _, error = command("train", "--config-dir", "mine", "experiment=bad")
    assert status == 1
    assert error.startswith("error: stage.warmup_ration: no such field; did you mean 'warmup_ratio'?")


def test_package_errors_have_no_traceback(command, monkeypatch):
    from skipvision_train.commands import train

    def refuse(cfg: object) -> None:
        raise ConfigError("trainer.seed: -1 is out of range")

    monkeypatch.setattr(train, "run", refuse)
    assert command("train") == (1, "", "error: trainer.seed: -1 is out of range\n")


def test_bugs_keep_their_traceback(tmp_path, monkeypatch):
    from skipvision_train.commands import train

    def break_(cfg: object) -> None:
        raise ZeroDivisionError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run", break_)
    monkeypatch.setattr(sys, "argv", ["skipvision"])
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])
