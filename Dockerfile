# Two images from one file:
#
#   docker build --target operator -t pretrain-operator .     the control plane, no torch
#   docker build --target trainer  -t pretrain-trainer .      torch, agent, trainer, a sample data set
#
# The order of layers is the order of change: system, torch, other libraries, our code. A change of
# code ships kilobytes, not gigabytes. No CUDA base image is needed, torch's wheels bring CUDA along.
# Any Debian-like base with Python 3.11 or newer and its venv module will do.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS base
ENV LANG=C.UTF-8 \
    PATH=/opt/pretrain/venv/bin:$PATH \
    PYTHONPATH=/opt/pretrain/app \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
# The venv stays without pip: nobody installs into a running container. /var/pretrain is where pods
# mount their volumes; the folders are here so that a plain `docker run` works as well. The user has
# a name because torch asks for it when it chooses cache folders.
RUN python3 -m venv --without-pip /opt/pretrain/venv && \
    echo "pretrain:x:10001:10001::/var/pretrain/scratch:/usr/sbin/nologin" >> /etc/passwd && \
    echo "pretrain:x:10001:" >> /etc/group && \
    mkdir -p /opt/pretrain/app /var/pretrain/output /var/pretrain/scratch && \
    chown -R 10001:10001 /var/pretrain
WORKDIR /var/pretrain

# Turns bounds and constraints into exact lists. Only their content decides whether the layers below
# are built again, so an edit of pyproject.toml that changes no version costs nothing.
FROM base AS requirements
ARG PIP_CERT=/etc/ssl/certs/ca-certificates.crt
ARG SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --quiet uv==0.13.8
COPY pyproject.toml constraints.txt /requirements/
RUN cd /requirements && \
    compile="/opt/uv/bin/uv pip compile --quiet --no-annotate --no-header --no-cache" && \
    $compile pyproject.toml --extra operator -c constraints.txt -o operator.txt && \
    $compile pyproject.toml --extra trainer -c constraints.txt -o trainer.txt && \
    echo torch | $compile - -c trainer.txt -o torch.txt

# The operator needs Python and nothing else, so no other program is left to whoever gets in: no
# shell, no package manager, nothing that downloads. Debian's list of packages stays, for scanners.
FROM base AS pruned
RUN rm -rf /etc/cron* /etc/init.d /usr/include /usr/share/doc /usr/share/locale /usr/share/man && \
    find /usr -depth \( -path "*/python3*/site-packages/*" -o -path "*/python3*/dist-packages/*" \
        -o -path "*/python3*/ensurepip*" \) -delete && \
    find /usr -path "*/lib*/*" -type f \
        \( -name "*.a" -o -perm /111 ! -name "*.so*" ! -name "*.py" \) -delete && \
    find /bin/ /sbin/ /usr/bin/ /usr/sbin/ /usr/local/bin/ /usr/local/sbin/ \
        ! -type d \( ! -name "python*" -o -name "*-config" \) -delete

# A copy into an empty image, because a layer that deletes only hides. Without a shell, commands from
# here on are lists of words. An empty image also knows no settings: these repeat those of base.
FROM scratch AS operator
COPY --from=pruned / /
ENV LANG=C.UTF-8 \
    PATH=/opt/pretrain/venv/bin \
    PYTHONPATH=/opt/pretrain/app \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
WORKDIR /var/pretrain
ARG SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
COPY --from=requirements /requirements/operator.txt /opt/pretrain/requirements/
RUN --mount=type=bind,from=requirements,source=/opt/uv/bin,target=/opt/uv/bin \
    ["/opt/uv/bin/uv", "pip", "install", "--no-cache", "--compile-bytecode", \
     "--python=/opt/pretrain/venv/bin/python", "-r", "/opt/pretrain/requirements/operator.txt"]
COPY api/pretrain_api /opt/pretrain/app/pretrain_api
COPY operator/pretrain_operator /opt/pretrain/app/pretrain_operator
RUN ["python", "-m", "compileall", "-q", "--invalidation-mode=unchecked-hash", "/opt/pretrain/app"]
LABEL org.opencontainers.image.title="pretrain-operator" \
      org.opencontainers.image.description="Control plane of PretrainJob" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 10001:10001
ENTRYPOINT ["python", "-m", "pretrain_operator"]

FROM base AS trainer
# torch.compile calls a C++ compiler and Triton a C compiler, with Python's headers, at run time.
# NCCL opens libibverbs and its drivers if they are there, and falls back to TCP in silence if not.
RUN apt-get update -qq && \
    headers=$(python3 -c 'import os, sysconfig; print(os.path.join(sysconfig.get_path("include"), "Python.h"))') && \
    if [ -e "$headers" ]; then dev=; else dev=python3-dev; fi && \
    apt-get install -y -qq --no-install-recommends g++ libc6-dev $dev \
        libibverbs1 ibverbs-providers librdmacm1 && \
    rm -rf /var/lib/apt/lists/*
ARG SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
COPY --from=requirements /requirements/torch.txt /opt/pretrain/requirements/
RUN --mount=type=bind,from=requirements,source=/opt/uv/bin,target=/opt/uv/bin \
    /opt/uv/bin/uv pip install --no-cache --compile-bytecode \
        --python /opt/pretrain/venv/bin/python -r /opt/pretrain/requirements/torch.txt
COPY --from=requirements /requirements/trainer.txt /opt/pretrain/requirements/
RUN --mount=type=bind,from=requirements,source=/opt/uv/bin,target=/opt/uv/bin \
    /opt/uv/bin/uv pip install --no-cache --compile-bytecode \
        --python /opt/pretrain/venv/bin/python -r /opt/pretrain/requirements/trainer.txt
COPY tests/assets /opt/pretrain/sample
COPY api/pretrain_api /opt/pretrain/app/pretrain_api
COPY trainer/pretrain_agent /opt/pretrain/app/pretrain_agent
COPY trainer/pretrain_trainer /opt/pretrain/app/pretrain_trainer
RUN python -m compileall -q --invalidation-mode unchecked-hash /opt/pretrain/app
ENV HOME=/var/pretrain/scratch
LABEL org.opencontainers.image.title="pretrain-trainer" \
      org.opencontainers.image.description="FSDP2 trainer and worker agent of PretrainJob" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 10001:10001
ENTRYPOINT ["python", "-m", "pretrain_agent"]
