#!/usr/bin/env bash
# One run on one slice of Cloud TPU: the command is started on every machine of the slice. DIRECTORY holds the
# installation on each (pip install ".[tpu]"), and --workdir lies on a disk that all have mounted, such as Filestore.
#
#   TPU=my-slice ZONE=us-east5-b experiments/launch/tpu_vm.sh --model=gemma3_1b --data=/mnt/notes.txt --workdir=/mnt/run
set -euo pipefail
flags=$(printf ' %q' "$@")
gcloud compute tpus tpu-vm ssh "${TPU:?the name of the slice}" --zone="${ZONE:?its zone}" --worker=all \
  --command="cd $(printf %q "${DIRECTORY:-dpgemma}") && ${PROGRAM:-.venv/bin/dpgemma} train$flags --coordinator=auto"
