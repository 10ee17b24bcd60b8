# The CUDA base is pinned to a patch release; torch's own wheels bring the CUDA libraries, the base the compiler.
#   docker build -t skipvision .
#   docker run --gpus all --ipc=host --network=host -v /data:/data -v "$PWD/outputs:/outputs" skipvision train ...
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
# Versions are the distribution's: a pinned one disappears from its mirrors with the next security fix.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends \
        python3 python3-venv python3-dev build-essential git make openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

# Training needs no root. The base image's own user takes uid 1000, so this one takes the next.
RUN useradd --create-home --uid 1001 trainer
USER 1001
WORKDIR /home/trainer/skipvision_train
ENV PATH=/home/trainer/skipvision_train/.venv/bin:$PATH

# What the project depends on changes seldom and takes gigabytes: installed before the sources are there, around an empty
# package, so that an edit does not install it again.
COPY --chown=1001 pyproject.toml README.md LICENSE ./
RUN mkdir skipvision_train conf data_recipes \
    && echo '__version__ = "0"' > skipvision_train/__init__.py \
    && python3 -m venv .venv && pip install -e '.[liger,qlora]'

COPY --chown=1001 skipvision_train ./skipvision_train
COPY --chown=1001 conf ./conf
COPY --chown=1001 data_recipes ./data_recipes
COPY --chown=1001 launch ./launch
COPY --chown=1001 Makefile ./
# The entry point answers, and what it runs can be imported.
RUN pip install --no-deps -e . && skipvision --version && skipvision flops format=json > /dev/null

ENTRYPOINT ["skipvision"]
CMD ["--help"]
