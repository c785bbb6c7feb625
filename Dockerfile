# dist_train with its dependencies in a virtual environment, run by a user without rights.
#   docker build -t IMAGE .                                             torch for CUDA, from pip's own index
#   docker build -t IMAGE --build-arg TORCH_INDEX=URL .                 from another: PyTorch's index of CPU wheels makes it small
#   mkdir -p runs && chmod a+w runs                                     the user in the container, 1000, writes there
#   docker run --gpus all --shm-size 1g -v DIR:/data:ro -v "$PWD/runs:/work/runs" IMAGE dist-train launch --data.path /data ...
FROM python:3.12-slim AS build
ARG TORCH_INDEX=
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.8" "torchvision>=0.23"
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY dist_train dist_train
COPY configs configs
RUN pip install --no-cache-dir .

FROM python:3.12-slim
RUN useradd --create-home --uid 1000 trainer && install --directory --owner trainer /work
COPY --from=build /venv /venv
COPY configs /work/configs
COPY launch/accelerate /work/launch/accelerate
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
USER 1000
CMD ["dist-train", "train", "--help"]
