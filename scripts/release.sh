#!/usr/bin/env bash
# Build the wheel and the source archive into dist, check them, and run the demo from the wheel in an empty environment (10 minutes):
#   scripts/release.sh
#   PYTHON=python3.13 scripts/release.sh    # with another Python
# It uploads nothing; CONTRIBUTING.md says how that is done.
set -euo pipefail
cd "$(dirname "$0")/.."
empty=$(mktemp -d)
trap 'rm -r "$empty"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
rm -rf dist
"${PYTHON:-python3}" -m venv "$empty/build"
"$empty/build/bin/pip" install --quiet build twine
"$empty/build/bin/python" -m build --outdir dist
"$empty/build/bin/twine" check --strict dist/*
for archive in dist/*; do
  "${PYTHON:-python3}" -m venv "$empty/venv"
  "$empty/venv/bin/pip" install --quiet -c constraints.txt torch==2.13.0
  "$empty/venv/bin/pip" install --quiet -c constraints.txt "$archive"
  mkdir "$empty/work"
  verb=demo  # the source archive makes the same wheel
  [ "${archive##*.}" = whl ] || verb=methods
  (cd "$empty/work" && "$empty/venv/bin/moa" "$verb")
  echo "$(basename "$archive"): moa $verb done"
  rm -r "$empty/venv" "$empty/work"
done
