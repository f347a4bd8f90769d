# `agl train`. In the repository's folder:
#   docker build --file deploy/docker/trainer.Dockerfile --tag agl-trainer:0.1.0 .
# TORCH is PyTorch for the machine: `torch` has CUDA; "--index-url https://download.pytorch.org/whl/cpu torch" has not.
# AGENT_PACKAGES is what the functions of train.tasks and train.reward need, and the agent, unless it runs in runners.
FROM python:3.11-slim AS build
ARG TORCH=torch
ARG AGENT_PACKAGES=""
COPY packages /src/packages
RUN python -m venv /opt/agl
RUN /opt/agl/bin/pip install --no-cache-dir $TORCH
RUN /opt/agl/bin/pip install --no-cache-dir "/src/packages/agl-core[server,postgres,redis,cassandra,rewards]" \
    /src/packages/agl-langchain /src/packages/agl-autogen "/src/packages/agl-trainer[gguf,report]" $AGENT_PACKAGES

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home agl
COPY --from=build /opt/agl /opt/agl
# Runs and downloaded models are in /var/lib/agl. A new volume of Docker takes the owner of the folder in the image.
ENV PATH=/opt/agl/bin:$PATH PYTHONUNBUFFERED=1 HOME=/var/lib/agl
RUN install --directory --owner 10001 /var/lib/agl
USER 10001
WORKDIR /home/agl
EXPOSE 8400 4318
ENTRYPOINT ["agl"]
CMD ["train", "--help"]
