#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the image and runs it with both of the README's commands. Run it with "make docker-test". Set IMAGE to test an existing
# image, and HOST to the IP address of the machine that DOCKER_HOST names.
set -euo pipefail
cd "$(dirname "$0")/.."
host=${HOST:-127.0.0.1}
options=(--rm -d --shm-size 18gb -p "$host:8000-8002:8000-8002")
if ! docker info &>/dev/null; then
    echo "docker_test.sh: Docker is not installed or not running" >&2
    exit 2
fi
if docker info --format '{{.Runtimes}}' | grep -q nvidia; then
    options+=(--gpus all)
else
    echo "docker_test.sh: Docker has no NVIDIA runtime, so this runs without a GPU" >&2
fi

# try NAME OPTION ...: start a container with these options, send it photos, stop it.
try() {
    echo "== $1"
    container=$(docker run "${options[@]}" "${@:2}")
    trap 'docker logs "$container" >&2; docker kill "$container" >/dev/null' EXIT
    # The first start downloads the weights.
    .venv/bin/python client.py --url "http://$host:8000" --init-timeout-s 600 --dump-images --output-dir output
    .venv/bin/python client.py --url "grpc://$host:8001" --class-name cat --image-paths images/cat_orig.jpg
    timeout 60 bash -c "until docker inspect --format '{{.State.Health.Status}}' $container | grep -qx healthy; do sleep 1; done"
    [ "$(docker exec "$container" id -u)" = 1000 ]
    trap - EXIT
    begin=$SECONDS
    docker stop "$container" >/dev/null &
    status=$(docker wait "$container")
    wait
    echo "== $1: healthy, answers, stopped within $((SECONDS - begin + 1)) s with status $status"
    [ "$status" = 0 ] && [ $((SECONDS - begin)) -lt 10 ]
}

[ -n "${IMAGE:-}" ] || docker build -t pytriton_dali .
image=${IMAGE:-pytriton_dali}
try "the container by itself" "$image"
try "the volume and bash" -v "$PWD:/dali" -w /dali "$image" bash -c "exec python server.py --address 0.0.0.0"
