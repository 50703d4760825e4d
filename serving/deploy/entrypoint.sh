#!/bin/sh
# Start Triton on the model repository at /models (or TAILOR_REPOSITORY), with the same restrictions as `tailor serve`.
# Arguments: further options of Triton. TAILOR_HOST: the address to listen on. TAILOR_ADMIN_KEY: the key for model
# control. TAILOR_EXIT_TIMEOUT: seconds for running requests at a stop (10).
set -eu

repository="${TAILOR_REPOSITORY:-/models}"
host="${TAILOR_HOST:-0.0.0.0}"
restricted=model-repository,shared-memory,statistics,trace,logging

fail() {
    echo "tailor: $1" >&2
    exit 2
}

image_model=classifier
if [ -d "$repository/segmenter" ]; then
    image_model=segmenter
fi
for name in student "$image_model"; do
    [ -f "$repository/$name/config.pbtxt" ] || fail "$repository: holds no $name/config.pbtxt; mount artifacts/repository there"
done
key="${TAILOR_ADMIN_KEY:-}"
# A caller that may load a model can run code here, so the server always has a key.
[ -n "$key" ] || key="$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')"
case "$key" in
    *[!A-Za-z0-9_-]*) fail "TAILOR_ADMIN_KEY is not usable; expected letters, digits, - or _" ;;
esac
[ "${#key}" -ge 16 ] || fail "TAILOR_ADMIN_KEY is too short; expected at least 16 characters"
unset TAILOR_ADMIN_KEY

exec tritonserver \
    --model-repository="$repository" \
    --model-control-mode=explicit \
    --load-model=student \
    --load-model="$image_model" \
    --disable-auto-complete-config \
    --strict-readiness=false \
    --exit-timeout-secs="${TAILOR_EXIT_TIMEOUT:-10}" \
    --http-address="$host" \
    --grpc-address="$host" \
    --http-restricted-api="$restricted:tailor-admin-key=$key" \
    --grpc-restricted-protocol="$restricted:tailor-admin-key=$key" \
    --metrics-config=summary_latencies=true \
    --metrics-config=summary_quantiles=0.5:0.05,0.95:0.01,0.99:0.001 \
    "$@"
