# CUDA base pinned to a minor release; torch's own wheels bring the matching CUDA libraries.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
RUN apt-get update && apt-get install -y --no-install-recommends \
        python3 python3-venv python3-dev build-essential git make openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

# Training needs no root. The base image's own user takes uid 1000, so this one takes the next.
RUN useradd --create-home --uid 1001 trainer
USER trainer
WORKDIR /home/trainer/skipvision_train

COPY --chown=trainer pyproject.toml README.md LICENSE Makefile ./
COPY --chown=trainer skipvision_train ./skipvision_train
COPY --chown=trainer conf ./conf
COPY --chown=trainer data_recipes ./data_recipes
COPY --chown=trainer launch ./launch
RUN python3 -m venv .venv && .venv/bin/pip install --upgrade pip && .venv/bin/pip install -e .
ENV PATH=/home/trainer/skipvision_train/.venv/bin:$PATH

ENTRYPOINT ["skipvision"]
CMD ["--help"]
