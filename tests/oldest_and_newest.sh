#!/usr/bin/env bash
# The demos' checks with the oldest and the newest versions of all that a plain installation needs, each in a virtual
# environment of its own: pyproject.toml's floors are what passes here. Needs the network and a Python that the oldest
# versions have wheels for (3.11 or 3.12).
#
#   tests/oldest_and_newest.sh [ENGINE_DIR ...]     engines to check in place of the demos
#   PYTHON=python3.12 tests/oldest_and_newest.sh
set -euo pipefail
engines=("$@")
(($#)) || engines=(demo:dq demo:mq)
here=$(cd "$(dirname "$0")/.." && pwd)
floors=$("${PYTHON:-python3}" - "$here/pyproject.toml" <<'CODE'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["cpu"])
CODE
)
for wanted in "${floors//>=/==}" "$floors"; do
    environment=$(mktemp -d)
    trap 'rm -rf "$environment"' EXIT
    "${PYTHON:-python3}" -m venv "$environment"
    # shellcheck disable=SC2086  # several words
    "$environment/bin/pip" install -q --disable-pip-version-check --upgrade --upgrade-strategy eager $wanted
    "$environment/bin/pip" freeze | tr '\n' ' '
    for engine in "${engines[@]}"; do
        echo "+ verify $engine"
        PYTHONPATH=$here "$environment/bin/python" -m dvq_rt verify "$engine"
    done
    rm -rf "$environment"
done
