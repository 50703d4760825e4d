#!/usr/bin/env bash
# Make the folder of wheels and image packs that a GPU machine without a network needs besides the repository.
#   benchmarks/gpu_pack.sh PACKS [FOLDER]    PACKS: folder of the four Parquet files; FOLDER: default gpu_pack
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  sed -n '2,3s/^# //p' "$0" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
packs=$1 folder=${2:-gpu_pack} limit_mb=60
names=(cifar10-train cifar10-test plankton-train plankton-test)
for name in "${names[@]}"; do
  if [ ! -f "$packs/$name.parquet" ]; then
    echo "gpu_pack.sh: $packs has no $name.parquet; expected the folder of the image packs" >&2
    exit 2
  fi
done
mkdir -p "$folder/data" "$folder/wheels"
[ "$packs" -ef "$folder/data" ] || for name in "${names[@]}"; do cp -f "$packs/$name.parquet" "$folder/data/"; done
rm -f "$folder"/wheels/*.whl # of an earlier version of Tailor
# The Python version of the GPU machine may be unknown, so the wheels of compiled packages are downloaded for each version.
versions=$(mktemp) && trap 'rm -f "$versions"' EXIT
sed -n 's/ \\$//; /^[a-z].*==/p' "$root/requirements/development.txt" > "$versions" # without hashes, which pip would require of all
for version in 3.11 3.12 3.13; do
  python -m pip download --quiet --disable-pip-version-check --dest "$folder/wheels" --constraint "$versions" \
    --only-binary=:all: --implementation cp --python-version "$version" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --platform manylinux2010_x86_64 \
    pydantic psutil ruamel.yaml hypothesis
done
bytes=$(du -cb "$folder"/*/* | tail -n 1 | cut -f 1)
echo "$folder: $((bytes / 1000000)) MB, $(find "$folder/wheels" -name '*.whl' | wc -l) wheels"
if [ "$bytes" -gt $((limit_mb * 1000000)) ]; then
  echo "gpu_pack.sh: $folder is larger than $limit_mb MB; delete files in it that are not needed" >&2
  exit 1
fi
