"""``skipvision serve``: a page on which people ask a model about their images."""

from __future__ import annotations

import importlib.util
import logging
import socket
from dataclasses import dataclass, field
from pathlib import Path

from skipvision_train.errors import ConfigError
from skipvision_train.serve.limits import Limits

log = logging.getLogger(__name__)

NEEDED = ("fastapi", "uvicorn")


@dataclass
class Config:
    """Settings of ``skipvision serve``."""

    checkpoint: str = "???"
    """Model directory: one of ours, or of transformers for images and text."""
    plans: list[str] = field(default_factory=list)
    """Plan files that visitors can choose besides ``own``, the checkpoint's, and ``dense``; named after the files."""
    system: str | None = None
    """A system message before every chat; null for none."""
    title: str | None = None
    """What the page calls the model; null: the name of the checkpoint's directory."""
    host: str = "127.0.0.1"
    """Address to listen at: 127.0.0.1 for this machine alone, 0.0.0.0 for everybody who reaches it."""
    port: int = 7860
    """To listen at; 0 takes a free one."""
    names: list[str] = field(default_factory=list)
    """Host names by which browsers reach the server, besides localhost and addresses."""
    proxies: list[str] = field(default_factory=list)
    """Addresses of proxies in front of the server: their X-Forwarded-For and X-Forwarded-Proto count."""
    connections: int = 256
    """At the same time; more are refused."""
    max_new_tokens: int = 256
    """Where an answer without an end is cut."""
    temperature: float = 0.0
    """0 takes the likeliest token every time."""
    top_p: float = 1.0
    """With a temperature: draw among the likeliest tokens that together have this share."""
    top_k: int = 0
    """With a temperature: draw among so many tokens at most; 0 among all."""
    device: str | None = None
    """``cpu``, ``cuda``, ``cuda:1``; null takes the GPU if there is one."""
    precision: str | None = None
    """``fp32``, ``bf16`` or ``fp16``; null keeps what the checkpoint was saved in."""
    limits: Limits = field(default_factory=Limits)
    """What visitors may do."""


def run(cfg: Config) -> None:
    """Load the model and serve until interrupted."""
    check(cfg)
    from skipvision_train.inference.assistant import Assistant
    from skipvision_train.inference.decoding import Sampling
    from skipvision_train.serve.answering import Answering, choices
    from skipvision_train.serve.app import make_app

    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
    with _listening(cfg.host, cfg.port) as listener:
        assistant = Assistant.open(cfg.checkpoint, None, cfg.device, cfg.precision)
        answering = Answering(assistant, choices(assistant, cfg.plans), sampling, cfg.limits, cfg.system)
        path = Path(cfg.checkpoint).resolve()
        app = make_app(answering, cfg.limits, cfg.title or f"{path.parent.name}/{path.name}", cfg.names)
        log.info("plans %s", ", ".join(answering.plans))
        _serve(app, cfg, listener)


def check(cfg: Config) -> None:
    """Refuse what cannot work, before anything is loaded.

    Raises:
        ConfigError: the first such field, or packages that are missing.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"serve: needs {' and '.join(missing)}; pip install 'skipvision-train[serve]'")
    if not 0 <= cfg.port <= 65535:
        raise ConfigError(f"port: {cfg.port}; 0 to 65535")
    if cfg.connections < 1:
        raise ConfigError(f"connections: {cfg.connections}; at least 1")
    for name in cfg.names:
        if not name or set(name) & set("/:* "):
            raise ConfigError(f"names: {name!r} is no host name; write it without https://, port and wildcards")
    cfg.limits.check()


def _listening(host: str, port: int) -> socket.socket:
    """A socket, bound before the model is loaded, so that a port in use is noticed at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(f"port: {port} at {host} cannot be listened at: {error.strerror or error}") from error


def _serve(app: object, cfg: Config, listener: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=bool(cfg.proxies),
        forwarded_allow_ips=cfg.proxies or None,
        limit_concurrency=cfg.connections,
        timeout_graceful_shutdown=5,
    )
    host, port = listener.getsockname()[:2]
    log.info("http://%s:%d", f"[{host}]" if ":" in host else host, port)
    uvicorn.Server(config).run(sockets=[listener])
