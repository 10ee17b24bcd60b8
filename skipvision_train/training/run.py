"""One stage from its configuration to a finished model directory, or to a description of it."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import sys
import warnings
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from skipvision_train.config.resolve import (
    check_vision_facts,
    load_tokenizer,
    model_config,
    source_path,
)
from skipvision_train.config.specs import LoraSpec, TrainConfig
from skipvision_train.config.validate import check_paths, check_sources, validate
from skipvision_train.data.dataset import RecordDataset
from skipvision_train.data.mixture import Mixture
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.data.recipes import load_recipe, load_records, load_streams
from skipvision_train.data.streams import Streams
from skipvision_train.errors import ConfigError, DataError, SkipVisionError
from skipvision_train.files import write_json, write_text
from skipvision_train.folders import filled, flatten
from skipvision_train.models.build import build_model, check_parts, check_stage, meta_model, start_stage
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.connector_settings import MqtConfig
from skipvision_train.models.loss import check_loss
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.vision import read_vision_checkpoint
from skipvision_train.plans.layout import IGNORE_INDEX
from skipvision_train.plans.rules import TokenKind
from skipvision_train.training import dryrun
from skipvision_train.training.arguments import engine_name
from skipvision_train.training.batching import BatchArithmetic, ElasticQueries, TrainCollator
from skipvision_train.training.checkpoints import (
    CONFIG,
    CheckpointInfo,
    all_checkpoints,
    check_same_run,
    is_finished,
    newest_complete,
)
from skipvision_train.training.feed import open_feed
from skipvision_train.training.lora import add_adapters
from skipvision_train.training.memory import weights_dtype
from skipvision_train.training.plan_schedule import PlanSchedule
from skipvision_train.training.ranks import check_started_alike
from skipvision_train.training.stages import apply_rates
from skipvision_train.training.trainer import StageParts, StageTrainer
from skipvision_train.training.watching import check_device_memory

log = logging.getLogger(__name__)

WEIGHTS = "weights.json"
"""In a run's folder: the names of tensors that started fresh (``missing``) or were not read (``unused``)."""


def run_stage(cfg: TrainConfig, callbacks: tuple[TrainerCallback, ...] = ()) -> Path:
    """Train one stage, or continue it.

    Args:
        cfg: composed configuration.
        callbacks: further ones for the trainer.

    Returns:
        the finished model's directory.

    Raises:
        SkipVisionError: whatever the user can mend.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    validate(cfg, processes)
    check_sources(cfg)
    if cfg.data.streaming and cfg.data.stream_lanes is None:
        # Recorded: the order is made of so many lanes, also when another number of processes goes on.
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, stream_lanes=processes))
    run = Path(cfg.trainer.output_dir)
    prepare_environment(cfg)
    # Held: processes that come later find the others' configurations in it.
    store = check_started_alike(dataclasses.asdict(cfg), cfg.trainer.guards.stuck_after)  # noqa: F841
    resume = find_start(cfg, run, processes)
    if resume == "finished":
        log.info("%s is finished: %s; nothing to do", run, run / "model")
        return run / "model"
    if os.environ.get("RANK", "0") == "0":
        record_configuration(cfg, run)
    set_seed(cfg.trainer.seed)
    parts = assemble(cfg)
    if os.environ.get("RANK", "0") == "0":
        write_json(run / "data.json", parts.records.manifest())
    arithmetic = BatchArithmetic.of(cfg.trainer, parts.feed.rows, processes, parts.feed.unit)
    log.info("%s", arithmetic.line())
    check_device_memory(cfg, parts.model)
    trainer = StageTrainer(cfg, parts, arithmetic, callbacks)
    start = None if resume is None else trainer.sound_start()
    log.info("start from %s", "step 0" if start is None else start[0])
    try:
        parts.feed.watched.guard(lambda: trainer.run_from(start))
    except DataError as error:
        # From a worker process the message arrives with the worker's traceback in front of it.
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from error
    final = trainer.save_finished()
    log.info("finished: %s", final)
    return final


def prepare_environment(cfg: TrainConfig) -> None:
    """What DeepSpeed reads from the environment: the device, and the process group of a run without a launcher.

    transformers' bars for loading and saving files are switched off; the trainer's own is ``trainer.progress_bar``.

    Raises:
        ConfigError: the launcher has started more processes than there are GPUs.
    """
    disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elif (rank := int(os.environ.get("LOCAL_RANK", "0"))) >= (gpus := torch.cuda.device_count()):
        raise ConfigError(
            f"PROCESSES: process number {rank + 1} of this machine has no GPU: there are {gpus}, one for each process; "
            f"use PROCESSES={gpus}"
        )
    if cfg.deepspeed is None or "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)


def find_start(cfg: TrainConfig, run: Path, processes: int) -> str | None:
    """Where the run begins: ``finished``, the path of a checkpoint, or None for step 0.

    Raises:
        ConfigError: the folder holds a run of another configuration, or a run at all with ``trainer.resume=never``.
        CheckpointError: the checkpoint was written by another number of processes or another engine.
    """
    recorded = run / CONFIG
    started = is_finished(run) or bool(all_checkpoints(run))
    if cfg.trainer.resume == "never" and started:
        raise ConfigError(f"trainer.resume: never, but {run} already holds a run; use another trainer.output_dir")
    if started and recorded.is_file():
        before = flatten(yaml.safe_load(recorded.read_text()))
        defaults = flatten(dataclasses.asdict(TrainConfig()))
        if any(key.startswith("stage.lora.") for key in before):
            defaults |= flatten(dataclasses.asdict(LoraSpec()), "stage.lora.")
        check_same_run(filled(before, defaults), dataclasses.asdict(cfg), run)
    if is_finished(run):
        return "finished"
    newest = newest_complete(run)
    if newest is None:
        return None
    path, info = newest
    info.check_fits(CheckpointInfo(info.step, processes, engine_name(cfg)), path)
    return str(path)


def record_configuration(cfg: TrainConfig, run: Path) -> None:
    """Write ``config.yaml``.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        write_text(run / CONFIG, yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False))
    except OSError as error:
        raise ConfigError(f"trainer.output_dir: {run} cannot be written: {error.strerror}") from error


def assemble(cfg: TrainConfig) -> StageParts:
    """Tokenizer, data and model of a stage, with the frozen parts frozen.

    Raises:
        SkipVisionError: a part is missing or does not fit.
    """
    tokenizer = load_tokenizer(cfg)
    if tokenizer is None:
        raise ConfigError("model.tokenizer: null, and neither model.llm nor stage.start_from gives one")
    config = model_config(cfg, tokenizer)
    processor = SkipVisionProcessor.from_config(config, tokenizer, cfg.stage.template)
    check_weights(cfg, config, meta_model(config))
    records, dataset = open_dataset(cfg, processor)
    feed = open_feed(cfg, records, dataset, Path(cfg.trainer.output_dir))
    model = open_model(cfg, config)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = processor.end_id  # answers end where the template ends them
    apply_rates(model, cfg.stage.lr)
    if cfg.stage.lora is not None:
        add_adapters(model, cfg.stage.lora)
    check_loss(cfg.trainer.loss)
    model.train_with(cfg.trainer.loss, read_supervised=cfg.trainer.last_layer == "supervised")
    if cfg.trainer.gradient_checkpointing:
        with warnings.catch_warnings():
            # The name of transformers 5.17, which later 5.x only deprecate.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    collator = TrainCollator(processor.pad_id, elastic_queries(cfg, config), feed.pack_length)
    return StageParts(model, processor, records, feed, collator)


def elastic_queries(cfg: TrainConfig, config: SkipVisionConfig) -> ElasticQueries | None:
    """What draws the number of queries of every batch, where the connector wants that."""
    connector = config.connector_config
    if not isinstance(connector, MqtConfig) or not connector.elastic:
        return None
    return ElasticQueries(config.image_token_id, connector.queries, cfg.trainer.seed)


def open_dataset(cfg: TrainConfig, processor: SkipVisionProcessor) -> tuple[Mixture | Streams, RecordDataset]:
    """The recipe's records, and the data set that encodes them."""
    recipe, data = load_recipe(cfg.data.recipe, cfg.data.root), cfg.data
    records = load_streams(recipe) if data.streaming else load_records(recipe)
    return records, RecordDataset(
        records,
        processor,
        cfg.stage.template,
        data.max_length,
        data.on_error,
        data.error_budget,
        draft=data.draft,
        resizer=data.resizer,
    )


def open_model(cfg: TrainConfig, config: SkipVisionConfig) -> SkipVisionForConditionalGeneration:
    """The stage's model with its weights, in the type in which they need the least of the CPU's memory."""
    dtype = weights_dtype(cfg)
    if cfg.stage.start_from is not None:
        model, report = start_stage(Path(cfg.stage.start_from), config, dtype)
    else:
        llm, vision = source_path(cfg.model.llm), source_path(cfg.model.vision_weights)
        connector = source_path(cfg.model.connector_weights)
        model, report = build_model(config, llm, vision, cfg.model.vision_architecture, connector, dtype)
    record = Path(cfg.trainer.output_dir) / WEIGHTS
    if os.environ.get("RANK", "0") == "0":
        write_json(record, report.names())
    log.info("weights: %s; their names are in %s", report.summary(), record)
    return model


def check_weights(cfg: TrainConfig, config: SkipVisionConfig, model: SkipVisionForConditionalGeneration) -> None:
    """Refuse weights that do not fit, by their configurations and headers alone; parts without a path are left out.

    Args:
        cfg: the configuration.
        config: the model's.
        model: the stage's, on the meta device, without adapters.

    Raises:
        ConfigError, CheckpointError: a path does not exist, a file is missing or cut, or what it holds does not fit.
    """
    vision = None
    if cfg.stage.start_from is None and cfg.model.vision_weights is not None:
        vision = read_vision_checkpoint(Path(cfg.model.vision_weights), cfg.model.vision_architecture, contents=False)
        check_vision_facts(cfg.model, vision.facts, vision.source)
    try:
        if cfg.stage.start_from is not None:
            check_stage(Path(cfg.stage.start_from), config, model)
        else:
            llm, connector = source_path(cfg.model.llm), source_path(cfg.model.connector_weights)
            check_parts(config, model, llm, vision, connector)
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from error


def describe_stage(cfg: TrainConfig) -> str:
    """What ``--dry-run`` prints. Builds the model on the meta device; needs no weights, data or GPU.

    Weights that are named are checked as far as their configurations and headers tell.

    Raises:
        SkipVisionError: the configuration cannot work.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    validate(cfg, processes)
    check_paths(cfg)
    tokenizer = load_tokenizer(cfg)
    config = model_config(cfg, tokenizer)
    model = meta_model(config)
    check_weights(cfg, config, model)
    parts = apply_rates(model, cfg.stage.lr)
    if cfg.stage.lora is not None:
        add_adapters(model, cfg.stage.lora)
    samples, sample = first_sample(cfg, config, tokenizer)
    # How many rows packing makes is known when the lengths are.
    rows, unit = (None, "rows") if cfg.data.pack else (samples, "samples")
    arithmetic = BatchArithmetic.of(cfg.trainer, rows, processes, unit)
    schedule = PlanSchedule.of(cfg, config.text_config.num_hidden_layers)
    return dryrun.report(cfg, config, schedule, model, parts, arithmetic, sample)


def first_sample(
    cfg: TrainConfig, config: SkipVisionConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int | None, list[str]]:
    """The number of records and a picture of the first one, or None and why it cannot be shown."""
    if tokenizer is None:
        return None, ["none: no tokenizer (model.tokenizer, model.llm or stage.start_from)"]
    try:
        records, dataset = open_dataset(cfg, SkipVisionProcessor.from_config(config, tokenizer, cfg.stage.template))
        first, count = (records.first(), None) if isinstance(records, Streams) else (0, len(dataset))
        example = dataset[first]
    except SkipVisionError as error:
        return None, [f"none: {error}"]
    if example is None:
        return count, ["none: the first record cannot be used; the log says why"]
    lines = dryrun.mark_sample(
        pieces=[str(tokenizer.decode([i])) for i in example.input_ids],
        kinds=[TokenKind(kind) for kind in example.token_kinds],
        supervised=[label != IGNORE_INDEX for label in example.labels],
        is_image=[i == config.image_token_id for i in example.input_ids],
    )
    return count, lines


def write_out(text: str) -> None:
    """Print on the first process."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(text)
