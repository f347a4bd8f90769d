# `agl runner`: an agent with the plug-ins, without servers, databases and torch. In the repository's folder:
#   docker build --file deploy/docker/agent.Dockerfile --tag agl-agent:0.1.0 .
# AGENT_PACKAGES is what the agent needs besides. Its code is copied in an image that begins with `FROM agl-agent:0.1.0`.
FROM python:3.11-slim AS build
ARG AGENT_PACKAGES=""
COPY packages /src/packages
RUN python -m venv /opt/agl
RUN /opt/agl/bin/pip install --no-cache-dir /src/packages/agl-core /src/packages/agl-langchain \
    /src/packages/agl-autogen $AGENT_PACKAGES

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home agl
COPY --from=build /opt/agl /opt/agl
ENV PATH=/opt/agl/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/agl
ENTRYPOINT ["agl"]
CMD ["runner", "--help"]
