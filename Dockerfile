# syntax=docker/dockerfile:1.7
# Tailor's images. Build one with: docker build --target train|serve|gateway -t tailor-<target> .
# `--build-arg TAILOR_COMMIT=$(git rev-parse --short=12 HEAD)` records the commit for `tailor --version` in `train`.
#   train    the pipeline on a CUDA runtime: DVC, Prefect, PyTorch (which brings its own CUDA libraries)
#   serve    NVIDIA's Triton with what the two models need; mount a model repository at /models
#   gateway  nginx with Tailor's bounds; the only image that untrusted clients may reach
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04
# 26.11 (Triton 2.75) is the newest release: it fixes a use-after-free in the dynamic batcher, which both models use, and was
# published after NVIDIA's bulletin of May 2026 on the bypass of restricted endpoints (docs/security.md). The tag is from the
# release notes. The tests run the container's files with the backend of release 24.10, not this image.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.11-py3
ARG DEBIAN_IMAGE=debian:12-slim
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${CUDA_IMAGE} AS train-build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/tailor
WORKDIR /build
COPY requirements/train.txt ./
RUN /opt/tailor/bin/pip install --require-hashes --no-deps -r train.txt
COPY pyproject.toml setup.py README.md LICENSE NOTICE ./
COPY models models
COPY pipeline pipeline
COPY recipes recipes
COPY serving serving
COPY tailor tailor
ARG TAILOR_COMMIT=unknown
RUN echo "${TAILOR_COMMIT}" > serving/shared/commit.txt \
    && /opt/tailor/bin/pip install --no-build-isolation --no-deps .

FROM ${CUDA_IMAGE} AS train
# Git for the code revision of a run, and for DVC's experiments.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 git \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 tailor
COPY --from=train-build /opt/tailor /opt/tailor
ENV PATH=/opt/tailor/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    DVC_NO_ANALYTICS=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=1
USER 10001
WORKDIR /work
CMD ["dvc", "repro"]

FROM ${TRITON_IMAGE} AS serve
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 ORT_DISABLE_TELEMETRY=1
COPY requirements/container.txt /opt/tailor/requirements.txt
# The image brings numpy; the classifier decodes with Pillow and logs logits with PyArrow. Ubuntu marks its Python as
# managed by apt.
RUN python3 -m pip install --break-system-packages --require-hashes --no-deps -r /opt/tailor/requirements.txt
COPY --chmod=0755 serving/deploy/entrypoint.sh serving/deploy/healthcheck.py /opt/tailor/
# The image's own user, without rights.
USER 1000:1000
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python3", "/opt/tailor/healthcheck.py"]
ENTRYPOINT ["/opt/tailor/entrypoint.sh"]
CMD ["--http-max-input-size=51380224"]

FROM ${PYTHON_IMAGE} AS gateway-config
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY requirements/gateway.txt ./
RUN pip install --require-hashes --no-deps -r gateway.txt
COPY models models
COPY serving serving
ARG UPSTREAM=127.0.0.1
RUN python -m serving.commands gateway --write /etc/tailor-gateway --runtime-folder /tmp --host 0.0.0.0 \
    --http-port 8443 --grpc-port 8444 --upstream-http "${UPSTREAM}:8000" --upstream-grpc "${UPSTREAM}:8001" \
    --certificate /etc/tailor-tls/tls.crt --key /etc/tailor-tls/tls.key

FROM ${DEBIAN_IMAGE} AS gateway
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends nginx-light libnginx-mod-http-lua libnginx-mod-stream lua-cjson \
    && rm -rf /var/lib/apt/lists/* /etc/nginx/sites-enabled /etc/nginx/modules-enabled \
    && useradd --system --uid 10002 tailor
COPY --from=gateway-config --chown=10002 /etc/tailor-gateway /etc/tailor-gateway
USER 10002
EXPOSE 8443 8444
STOPSIGNAL SIGQUIT
# nginx listens where its certificate could be read; the check opens a connection only, because the certificate is not trusted here.
HEALTHCHECK --interval=15s --timeout=5s --retries=3 CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8443"]
# A container that was killed may find its Unix sockets in /tmp again, on which nginx could not listen.
ENTRYPOINT ["sh", "-c", "rm -f /tmp/*.sock && exec nginx -p /tmp -c /etc/tailor-gateway/nginx.conf -e stderr"]
