# SPDX-License-Identifier: Apache-2.0
# The proxy: Debian 12's nginx and njs, as tested, with the security fixes that exist when you build the image. To update
# it, choose the base image's newest tag for Debian 12, and build with --no-cache.
FROM debian:12.14-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends nginx libnginx-mod-http-js \
    && rm -rf /var/lib/apt/lists/*
COPY nginx.conf infer.js api_keys.conf servers.conf /etc/proxy/
COPY page /etc/proxy/page/
USER www-data
EXPOSE 8080 8081
# On SIGQUIT, nginx finishes the requests in flight.
STOPSIGNAL SIGQUIT
# Checks the model through the proxy, as clients reach it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5s CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8080 \
    && printf 'GET /v2/models/ResNet101/ready HTTP/1.0\\r\\n\\r\\n' >&3 && head -n 1 <&3 | grep -q ' 200 '"]
CMD ["nginx", "-p", "/tmp", "-c", "/etc/proxy/nginx.conf"]
