#!/bin/sh
# Stop the Ray that cluster/onprem.yaml started, on each USER@HOST given: head first, or it would start
# its workers again; and nothing else on those machines. `ray down` would run `ray stop`, which ends every Ray of that account.
set -eu
[ $# -gt 0 ] || { echo "usage: $0 USER@HEAD USER@WORKER ..." >&2; exit 2; }
failed=0
for host in "$@"; do
  # The remote shell, not this one, expands what stands between the quotes.
  # shellcheck disable=SC2016
  ssh -o BatchMode=yes "$host" '
    pid=$(cat ~/.simclr-ray/ray.pid 2>/dev/null || true)
    if [ -n "$pid" ] && ps -o args= -p "$pid" | grep -q "ray start"; then
      kill -TERM "$pid"; timeout 60 tail --pid="$pid" -f /dev/null
      kill -KILL "-$pid" 2>/dev/null || true # agents, which would wait a minute for the head
    fi
    rm -f ~/.simclr-ray/ray.pid' || { echo "$host: could not be stopped" >&2; failed=1; }
done
exit $failed
