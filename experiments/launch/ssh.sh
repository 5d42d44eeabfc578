#!/usr/bin/env bash
# One run on several machines, over plain ssh. On each of them DIRECTORY holds the same installation, and all see the
# folder of --workdir (give an absolute path) and the data.
#
#   HOSTS="node1 node2" experiments/launch/ssh.sh --model=vaultgemma_1b --data=/shared/notes.txt --workdir=/shared/run
#
# PORT has to be free on the first machine, and the machines have to reach each other's ports. When one process ends with
# an error, all end; the same command goes on.
set -euo pipefail
read -ra hosts <<<"${HOSTS:?name the machines, the first one keeps the record: HOSTS=\"node1 node2\"}"
directory=${DIRECTORY:-$PWD} program=${PROGRAM:-.venv/bin/dpgemma} port=${PORT:-7651}
flags=$(printf ' %q' "$@" --coordinator="${hosts[0]}:$port" --num_processes="${#hosts[@]}")
for number in "${!hosts[@]}"; do
  ssh "${hosts[$number]}" "cd $(printf %q "$directory") && $program train$flags --process_id=$number" &
  started[number]=$!
done
code=0
for process in "${started[@]}"; do
  wait "$process" || code=$?
done
exit "$code"
