"""A stage small enough for a test: byte tokenizer with LLaMA-3's control tokens, twelve records, a two-layer model."""

from __future__ import annotations

import copy
import json

import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from skipvision_train.config.specs import TrainConfig

CONTROL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)

STAGE = {
    "model": {
        "from_scratch": True,
        "text": {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        },
        "vision": {
            "image_size": 32,
            "patch_size": 4,
            "width": 32,
            "layers": 2,
            "heads": 2,
            "mlp_ratio": 2.0,
            "depths": [1, 2],
        },
        "connector": {"windows": [8, 4, 2], "queries": [2, 4, 16], "head_dim": 16},
        "reducer": {"local_keep": 6},
    },
    "plan": {"method": "skip_ffn"},
    "stage": {
        "template": "llama3",
        "warmup_ratio": 0.25,
        "lr": {"vision": 1e-3, "connector": 2e-3, "reducer": 1e-3, "llm": 5e-3},
    },
    "data": {"max_length": 256},
    "trainer": {
        "max_steps": 4,
        "epochs": None,
        "per_device_batch": 2,
        "global_batch": 4,
        "precision": "fp32",
        "workers": 0,
        "log_every": 1,
        "save_every": 2,
        "progress_bar": False,
        "gradient_checkpointing": False,
    },
}


HD_DEFAULTS = {"defaults": [{"override /model": "llava"}, {"override /connector@model.connector": "mlp"}]}
"""LLaVA's projector in place of the resampler."""


def write_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    ).save_pretrained(folder)


def write_data(folder):
    """Ten records with an image and two without: some micro batches have no image at all."""
    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(12):
        answer = {"from": "gpt", "value": "red " * (i % 5 + 1)}
        if i in (4, 5):
            records.append({"id": i, "conversations": [{"from": "human", "value": "name a colour"}, answer]})
            continue
        size = (40, 30) if i % 3 else (30, 70)  # other numbers of tiles, where images are cut into tiles
        Image.new("RGB", size, (20 * i, 255 - 20 * i, 90)).save(folder / "images" / f"{i}.png")
        question = {"from": "human", "value": "<image>\nwhich colour?"}
        records.append({"id": i, "image": f"{i}.png", "conversations": [question, answer]})
    (folder / "data.json").write_text(json.dumps(records))
    source = {"name": "tiny", "path": "data.json", "image_root": "images"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"sources": [source]}))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Tokenizer, data, and a configuration directory whose ``experiment=tiny`` is the stage."""
    folder = tmp_path_factory.mktemp("stage")
    write_tokenizer(folder / "tokenizer")
    write_data(folder / "data")
    stage = copy.deepcopy(STAGE)
    stage["model"]["tokenizer"] = str(folder / "tokenizer")
    stage["data"]["recipe"] = str(folder / "data" / "recipe.yaml")
    (folder / "conf" / "experiment").mkdir(parents=True)
    hd = copy.deepcopy(stage)
    hd["model"]["connector"] = {"type": "mlp", "layers": 2, "pool": 1}
    hd["model"]["vision"] |= {"image_size": 16, "depths": [2]}
    hd["model"]["tiling"] = {"mode": "aspect", "max_tiles": 3}
    tiles = {"split": "tiles", "local_keep": 20, "summary": "both", "former_over": "retained", "last_local_ffn": False}
    hd["model"]["reducer"] = tiles
    heads = {"tiny": "# @package _global_", "tiny_hd": f"# @package _global_\n{yaml.safe_dump(HD_DEFAULTS)}"}
    for name, values in (("tiny", stage), ("tiny_hd", hd)):
        text = f"{heads[name]}\n{yaml.safe_dump(values, sort_keys=False)}"
        (folder / "conf" / "experiment" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def make_cfg(workspace, tmp_path):
    """The stage's configuration with changes given as dotted overrides; each call gets ``tmp_path/run`` by default."""

    def make(*overrides: str, experiment: str = "tiny") -> TrainConfig:
        stage = yaml.safe_load((workspace / "conf" / "experiment" / f"{experiment}.yaml").read_text())
        stage.pop("defaults", None)
        stage["trainer"]["output_dir"] = str(tmp_path / "run")
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), stage, OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_object(merged)

    return make


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher's environment."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
