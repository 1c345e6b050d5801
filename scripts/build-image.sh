#!/usr/bin/env bash
# Build the Dockerfile with buildah, without a registry, on a stand-in for NVIDIA's container, and try the image. Needs Debian, root.
#
# The stand-in is a Debian 12 tree (Python 3.11) with CPU PyTorch and everything that the Dockerfile relies on: packages that must
# keep their version (among them a numpy as old as NVIDIA's), a pip constraints file, and an entry script.
#
#   scripts/build-image.sh [ARGUMENTS...]     arguments of `buildah bud`, such as --build-arg USER_ID=2000 -v WHEELS:WHEELS:ro
#
#   IMAGE            name of the image; default: localhost/flextron. It is in a store in STATE.
#   STATE            directory for the tree and the images, about 8 GB; default: build/image
#   DEBIAN_MIRROR    mirror for debootstrap; default: debootstrap's
#   TORCH_INDEX_URL  package index for PyTorch's CPU builds, used after pip's own indexes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

IMAGE=${IMAGE:-localhost/flextron}
STATE=${STATE:-build/image}
TORCH_INDEX_URL=${TORCH_INDEX_URL-https://download.pytorch.org/whl/cpu}
STAND_IN=localhost/stand-in
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot

say() { echo "build-image: $*"; }
fail() {
    echo "build-image: error: $*" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || fail "needs root, as debootstrap and buildah's chroot isolation do"
for tool in buildah debootstrap; do
    command -v $tool >/dev/null || fail "$tool is not installed: apt-get install --no-install-recommends buildah debootstrap"
done
mkdir -p "$STATE"
STATE=$(realpath "$STATE")
TREE=$STATE/debian12
in_store() { buildah --root "$STATE/store" --runroot "$STATE/run" "$@"; }

# Give the build this machine's pip settings and certificates.
settings=(--network host --layers=false)
mount() { if [ -f "$1" ]; then settings+=(-v "$(realpath "$1"):$2:ro"); fi; }
mount "${PIP_CONFIG_FILE:-/etc/pip.conf}" /etc/pip.conf
mount /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
settings+=("$@")

if [ ! -e "$TREE.complete" ]; then
    say "making a Debian 12 tree in $TREE (about two minutes, once)"
    rm -rf --one-file-system "$TREE"
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python-is-python3 bookworm "$TREE" \
        ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$STATE/debootstrap.log" 2>&1 || fail "debootstrap failed; see $STATE/debootstrap.log"
    touch "$TREE.complete"
fi

if ! in_store inspect --type image $STAND_IN >/dev/null 2>&1; then
    torch=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)
    say "building the stand-in base with PyTorch $torch for CPU"
    in_store bud "${settings[@]}" --tag $STAND_IN -f - "$TREE" <<EOF
FROM scratch
ADD . /
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
RUN mkdir -p /etc/pip /opt/nvidia && printf '%s\n' numpy==1.26.4 packaging==25.0 scipy==1.16.1 > /etc/pip/constraint.txt \
    && printf '#!/bin/sh\necho "entry script of the base"\nexec "\$@"\n' > /opt/nvidia/nvidia_entrypoint.sh \
    && chmod 755 /opt/nvidia/nvidia_entrypoint.sh
RUN pip install --no-cache-dir numpy packaging \
    && { pip install --no-cache-dir torch==$torch+cpu || pip install --no-cache-dir --index-url "$TORCH_INDEX_URL" torch==$torch+cpu; }
EOF
fi

say "building $IMAGE"
began=$SECONDS
in_store bud "${settings[@]}" --build-arg BASE=$STAND_IN --tag "$IMAGE" -f Dockerfile .
say "built in $((SECONDS - began)) s"

containers=()
cleanup() { [ ${#containers[@]} = 0 ] || in_store rm "${containers[@]}" >/dev/null; }
trap cleanup EXIT
start() { # start IMAGE: create a container of it, whose name is in $container
    container=$(in_store from --pull-never "$1")
    containers+=("$container")
}

start $STAND_IN
in_store run "$container" -- python3 -m pip list --format=freeze >"$STATE/base.txt"
start "$IMAGE"
in_store run "$container" -- python3 -m pip list --format=freeze >"$STATE/image.txt"
changed=$(grep -vxFf "$STATE/image.txt" "$STATE/base.txt" || true)
[ -z "$changed" ] || fail "the image changed packages of the base: $changed"
say "all $(wc -l <"$STATE/base.txt") packages of the base are as they were, of $(wc -l <"$STATE/image.txt") in the image"

entry=(/opt/nvidia/nvidia_entrypoint.sh flextron)
runs=/workspace/runs
say "as the image's user"
in_store run "$container" -- sh -euc "id; touch $runs/written; rm $runs/written"
in_store run "$container" -- "${entry[@]}" --help

# enroot runs as a user that the image does not know and that has no home directory: so does this.
stranger() { in_store run --user 4242:4242 --env HOME=/nowhere --env GLOO_SOCKET_IFNAME=lo --env OMP_NUM_THREADS=1 "$container" -- "$@"; }
say "as user 4242"
# shellcheck disable=SC2016  # expanded in the container
stranger sh -euc 'id; if getent passwd 4242 || mkdir -p "$HOME" 2>/dev/null; then exit 1; fi'
stranger "${entry[@]}" prepare input=/usr/lib/python3.11/email valid_fraction=0.2 vocab_size=512 out=$runs/data
# Not --standalone: it would wait for the container's host name, which cannot be resolved under buildah.
stranger torchrun --master-addr 127.0.0.1 --master-port "${PORT:-29511}" --nproc-per-node 2 -m flextron_mcore pretrain \
    data=$runs/data out=$runs/parent model.num_layers=2 model.hidden_size=64 model.num_attention_heads=8 model.ffn_hidden_size=64 \
    model.max_position_embeddings=32 model.tensor_model_parallel_size=2 trainer.max_steps=3
# A network whose export contains code, which transformers copies into its cache.
layer() { echo "{\"executed\": true, \"kv_groups\": $1, \"query_heads_per_group\": 1, \"ffn_hidden_size\": $2}"; }
stranger sh -euc "echo '{\"hidden_size\": 64, \"layers\": [$(layer 2 64), $(layer 8 16)]}' > $runs/net.json"
stranger "${entry[@]}" export checkpoint=$runs/parent subnetwork=$runs/net.json verify=true out=$runs/export
say "done; $IMAGE is in the store $STATE/store"
