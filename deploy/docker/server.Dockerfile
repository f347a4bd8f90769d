# `agl serve`: collector, gateway and page. In the repository's folder:
#   docker build --file deploy/docker/server.Dockerfile --tag agl-server:0.1.0 .
FROM python:3.11-slim AS build
COPY packages /src/packages
RUN python -m venv /opt/agl
RUN /opt/agl/bin/pip install --no-cache-dir "/src/packages/agl-core[server,postgres,redis,cassandra]"

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home agl
COPY --from=build /opt/agl /opt/agl
ENV PATH=/opt/agl/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/agl
EXPOSE 8400 4318 4317
ENTRYPOINT ["agl"]
CMD ["serve", "--help"]
