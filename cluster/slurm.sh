#!/bin/bash
# One pretraining run on the nodes of a Slurm allocation: Ray is started on each by srun, the run in the
# batch script on the first.
#
# Cost: the allocation, 4 nodes for 24 h at most; it is given back when the run ends.
# Size: 4 nodes with 4 GPUs and 64 CPUs each: 16 workers, decoding on the CPUs beside them.
# Spot: on a partition that preempts, --requeue and --signal go on from where the run stood.
# Verified: on a stand-in for srun that starts each step on this machine (tests/cluster/test_slurm.py),
#   and `cluster check`; not under Slurm itself, and on no GPU.
#
# Once: an environment that all nodes see, and a token (docs/cluster.md). Edit every REPLACE-ME; then
#
#   simclr-ray cluster check cluster/slurm.sh
#   sbatch cluster/slurm.sh
#
# Not `ray symmetric-run`: it ends in `ray stop`, which ends your other jobs' Ray on a node, hands no
# signal on to the run, and exits 0 where Ray did not start. Here SIGTERM, which --signal sends 5 minutes
# before the end, makes all ranks save their step; the run exits 75 and the job is queued again.
#SBATCH --job-name=simclr-ray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=simclr-ray-%j.log
set -euo pipefail

# shellcheck source=/dev/null
. /REPLACE-ME/simclr-ray/env/bin/activate
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.simclr-ray/auth_token
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs of one node do not meet
export RAY_ADDRESS=$SLURMD_NODENAME:$port
# Since Slurm 22.05 srun does not take --cpus-per-task from sbatch: Ray would run on one core of these.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# The first node, where this script runs, offers two CPUs less: for Ray's own processes and the driver.
# A socket's path may have 107 letters, hence the short folder, which other nodes take from the head.
env -u RAY_ADDRESS srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" \
  ray start --head --block --port="$port" --temp-dir="/tmp/ray-$SLURM_JOB_ID" \
  --num-cpus=$((SLURM_CPUS_PER_TASK - 2)) --labels=node-group=gpu \
  --dashboard-host=127.0.0.1 --disable-usage-stats &
steps=($!)
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then # Ray tries again until the head answers
  env -u RAY_ADDRESS srun --overlap --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 \
    --exclude="$SLURMD_NODENAME" \
    ray start --block --address="$RAY_ADDRESS" --num-cpus="$SLURM_CPUS_PER_TASK" \
    --labels=node-group=gpu --disable-usage-stats &
  steps+=($!)
fi
# End Ray, and remove its folder on every node; where the job fails it stays, since its logs say why.
# shellcheck disable=SC2317 # by the trap
end() {
  trap - EXIT
  kill -TERM "${steps[@]}" 2>/dev/null || true
  wait "${steps[@]}" || true
  if [ "$1" -eq 0 ] || [ "$1" -eq 75 ]; then
    timeout 60 srun --overlap --ntasks-per-node=1 rm -rf "/tmp/ray-$SLURM_JOB_ID" || true
  else
    echo "Ray's logs are in /tmp/ray-$SLURM_JOB_ID of each node; nothing removes them" >&2
  fi
}
trap 'end $?' EXIT

# Until all nodes have joined, 5 minutes at most; where Ray has ended on one, it will not.
for _ in $(seq 150); do
  for step in "${steps[@]}"; do kill -0 "$step" 2>/dev/null || { echo "Ray ended" >&2; exit 1; }; done
  joined=$(ray list nodes --filter state=ALIVE --format json 2>/dev/null | grep -c '"node_id"' || true)
  [ "$joined" -ge "$SLURM_JOB_NUM_NODES" ] && break
  sleep 2
done

# scaling.num_workers is nodes times GPUs. Each worker decodes on its node's own CPUs: no data nodes.
simclr-ray pretrain cifar10_resnet18 \
  data.train=/REPLACE-ME/cifar10/train data.eval_train=/REPLACE-ME/cifar10/train \
  data.test=/REPLACE-ME/cifar10/test storage=/REPLACE-ME/simclr-ray/runs \
  tracking.uri=http://REPLACE-ME:5000 batch_size=4096 \
  scaling.num_workers=16 scaling.gpus_per_worker=1 scaling.data_actors_per_worker=8 &
run=$!
trap 'kill -TERM "$run"' TERM
wait "$run" || true
while kill -0 "$run" 2>/dev/null; do wait "$run" || true; done # a signal ends `wait`, not the run
code=0
wait "$run" || code=$?
end "$code" # before the job is queued again, which ends this script
# At most so many times, whatever the run has done in between: one that gets nowhere must end.
MOST_REQUEUES=50
if [ "$code" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MOST_REQUEUES" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
