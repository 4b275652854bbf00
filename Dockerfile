# SPDX-License-Identifier: Apache-2.0
FROM python:3.11-slim-bookworm

# video: without it the hardware JPEG decoder of the GPU stays off.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    PYTHONUNBUFFERED=1

# Whoever runs the container, the server has no rights in it. torch's download cache is in its home: mount a volume there.
RUN useradd --create-home --uid 1000 app && install -d -o app /app /home/app/.cache /home/app/.cache/torch
WORKDIR /app

# The packages first: a change of the code does not install them again. The wheels bring CUDA with them.
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt

USER 1000

# docker build --build-arg WEIGHTS=pretrained: with torchvision's weights in the image, for machines without a network.
ARG WEIGHTS=
RUN if [ "$WEIGHTS" = pretrained ]; then python -c "from torchvision.models.segmentation import \
    DeepLabV3_ResNet101_Weights as W; W.COCO_WITH_VOC_LABELS_V1.get_state_dict(progress=False, check_hash=True)"; fi

COPY *.py ./
COPY images images
COPY weights weights

EXPOSE 8000 8001 8002

# Triton's own /v2/health/ready says yes before the model is there.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/models/ResNet101/ready', timeout=4)"]

CMD ["python", "server.py", "--address", "0.0.0.0"]
