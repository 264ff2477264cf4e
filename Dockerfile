# One image for head, workers and client: all need the same Ray and the same Python.
#   CPU: docker build -t registry.example.com/raykernel:0.1.0 .
#   GPU: the same with --build-arg BASE=rayproject/ray:2.60.0-py311-gpu
ARG BASE=rayproject/ray:2.60.0-py311-cpu

FROM ${BASE} AS wheel
COPY --chown=1000:100 pyproject.toml README.md LICENSE /tmp/source/
COPY --chown=1000:100 raykernel /tmp/source/raykernel
COPY --chown=1000:100 conf /tmp/source/conf
COPY --chown=1000:100 sweeps /tmp/source/sweeps
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /tmp/wheel /tmp/source

FROM ${BASE}
# wget and bash stay: KubeRay's probes and commands use them. No ENTRYPOINT: KubeRay sets the command.
# Ray's images call this user ray; as a number, Kubernetes can see that it is not root.
USER 1000:100

# The image's Ray stays as it is; a second one would not talk to it. What changes with every commit
# comes last, without its dependencies, so that they are installed once.
COPY --chown=1000:100 pyproject.toml /tmp/needed/
RUN python -c "import tomllib; print(*tomllib.load(open('/tmp/needed/pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > /tmp/needed/requirements.txt \
    && python -c "import ray; print(f'ray=={ray.__version__}')" > /tmp/needed/constraints.txt \
    && pip install --no-cache-dir -r /tmp/needed/requirements.txt -c /tmp/needed/constraints.txt
COPY --chown=1000:100 --from=wheel /tmp/wheel /tmp/wheel
RUN pip install --no-cache-dir --no-deps /tmp/wheel/*.whl

# Shared memory of a container is 64 MB unless --shm-size says otherwise; Ray wants more (KubeRay
# sees to it). Models land in the cache: mount a volume on /home/ray/.cache, or set XDG_CACHE_HOME.
ENV RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
WORKDIR /home/ray
CMD ["raykernel", "--help"]
