# SPDX-License-Identifier: Apache-2.0
# To update the base image, choose its newest tag for Python 3.11. To pin its contents as well, append @ and the digest
# that this prints: docker buildx imagetools inspect python:3.11.15-slim-bookworm
FROM python:3.11.15-slim-bookworm

# The capability "video" is for the GPU's JPEG hardware (--jpeg-hardware).
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    PYTHONUNBUFFERED=1

# deploy/compose.yaml uses tini as the entry point.
RUN apt-get update && apt-get install --yes --no-install-recommends tini && rm -rf /var/lib/apt/lists/*

# Run the server as an unprivileged user. To keep torch's download cache, mount a volume on it.
RUN useradd --create-home --uid 1000 app && install -d -o app /app /home/app/.cache /home/app/.cache/torch
WORKDIR /app

# Install the packages first, so that a change of the code does not reinstall them. The wheels include CUDA.
COPY requirements.txt ./
RUN pip install --no-cache-dir --require-hashes -r requirements.txt

COPY *.py ./
COPY photo photo
COPY serving serving
COPY weights weights
COPY images images
USER 1000

# For machines without internet access, docker build --build-arg WEIGHTS=pretrained downloads the pretrained weights into
# the image.
ARG WEIGHTS=
RUN if [ -n "$WEIGHTS" ]; then \
    python -c "import server, weights.loading; weights.loading.load_weights('$WEIGHTS', server.NETWORK)"; fi

EXPOSE 8000 8001 8002

# Triton's own /v2/health/ready returns 200 before the model is ready.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as u; os.environ['no_proxy'] = '*'; \
        u.urlopen('http://127.0.0.1:8000/v2/models/ResNet101/ready', timeout=4)"]

CMD ["python", "server.py", "--address", "0.0.0.0"]
