# The tag moves with Python's security fixes; what is installed on top is pinned by hash.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY requirements.lock requirements-dev.lock ./
# No pip in what is shipped, and no sdist: building one runs its code here.
RUN python -m venv --without-pip /opt/broker \
 && python -m pip --python /opt/broker/bin/python install --require-hashes --only-binary :all: --requirement requirements.lock
# The build backend comes by hash as well, hence no build isolation below.
RUN sed -n '/^setuptools==/,/[^\\]$/p' requirements-dev.lock > build.lock \
 && python -m pip install --require-hashes --only-binary :all: --requirement build.lock
COPY pyproject.toml setup.py README.md LICENSE ./
COPY config config
COPY migrations migrations
COPY broker broker
RUN python -m pip wheel --no-index --no-deps --no-build-isolation --wheel-dir dist . \
 && python -m pip --python /opt/broker/bin/python install --no-index --no-deps dist/*.whl

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="agent-credential-broker" \
      org.opencontainers.image.description="Just-in-time credentials for AI agents" \
      org.opencontainers.image.licenses="Apache-2.0"
# A name for the number: `broker apply` records who applied.
RUN groupadd --gid 65532 broker \
 && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /var/lib/broker --shell /usr/sbin/nologin broker \
 && install --directory --owner 65532 --group 65532 --mode 0700 /var/lib/broker
COPY --from=build /opt/broker /opt/broker
# The one writable directory also takes temporary files, so that the rest can be mounted read-only.
ENV PATH=/opt/broker/bin:$PATH TMPDIR=/var/lib/broker PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /var/lib/broker
VOLUME /var/lib/broker
# Numeric, or Kubernetes cannot see that it is not root.
USER 65532:65532
EXPOSE 8080
# http.client and not urllib: a proxy in the environment is not for the loopback.
HEALTHCHECK --interval=10s --timeout=4s --start-period=20s --retries=3 \
  CMD ["python", "-I", "-c", "import http.client as h, sys; c = h.HTTPConnection('127.0.0.1', 8080, timeout=3); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
# The exec form makes the broker process 1, which SIGTERM reaches: it answers what is under way, then ends.
ENTRYPOINT ["broker"]
CMD ["serve", "--config", "/etc/broker/broker.toml"]
