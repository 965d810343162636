#!/bin/bash
# Start a Prefect worker that is also a Ray node. A flow that the worker starts is a Ray driver, and a driver must run
# on a node of its cluster; with zero CPUs the node takes no work itself. RAY_HEAD: host:port of the cluster's head.
set -euo pipefail
: "${RAY_HEAD:?expected host:port of the Ray head}"

# When the node ends, as when the head was restarted, the worker ends too: a container that is restarted joins anew.
(
    ray start --address="$RAY_HEAD" --num-cpus=0 --num-gpus=0 --object-store-memory=268435456 --block || true
    kill $$
) &

until wget -q -T 2 -t 1 -O /dev/null http://127.0.0.1:52365/api/healthz; do sleep 1; done
exec prefect worker start --pool memmcl --type process --with-healthcheck
