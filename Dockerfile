# One image for head, workers and client: all need the same Ray and the same Python.
# CPU: docker build -t raykernel .        GPU: docker build --build-arg BASE=rayproject/ray:2.60.0-py311-gpu -t raykernel .
ARG BASE=rayproject/ray:2.60.0-py311-cpu
FROM ${BASE}

# wget and bash stay: KubeRay's probes and commands use them. No ENTRYPOINT: KubeRay sets the command.
USER ray
WORKDIR /home/ray/raykernel
COPY --chown=ray:users pyproject.toml README.md LICENSE ./
COPY --chown=ray:users raykernel raykernel
COPY --chown=ray:users conf conf
COPY --chown=ray:users sweeps sweeps

# The image's Ray stays as it is; a second one would not talk to it.
RUN pip install --no-cache-dir "ray[default]==$(python -c 'import ray; print(ray.__version__)')" .

# Shared memory of a container is 64 MB unless --shm-size says otherwise; Ray wants more.
# Models land in the cache: mount a volume on /home/ray/.cache.
ENV RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
CMD ["raykernel", "--help"]
