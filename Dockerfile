# One image for every part; the command chooses which. Two stages, so that pip and caches stay behind.
FROM python:3.12-slim AS build
WORKDIR /src
RUN python -m venv /opt/glowplug
COPY constraints.txt pyproject.toml README.md ./
COPY worker worker
COPY scheduler scheduler
COPY snapshots snapshots
COPY guests guests
RUN /opt/glowplug/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.12-slim
RUN useradd --uid 10001 --create-home glowplug && install -d -o glowplug -g glowplug /var/lib/glowplug
COPY --from=build /opt/glowplug /opt/glowplug
ENV PATH=/opt/glowplug/bin:$PATH GLOWPLUG_STATE_DIR=/var/lib/glowplug PYTHONUNBUFFERED=1
USER glowplug
VOLUME /var/lib/glowplug
EXPOSE 8080
ENTRYPOINT ["glowplug"]
CMD ["serve", "--host", "0.0.0.0"]
