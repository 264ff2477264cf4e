#!/usr/bin/env bash
# raykernel on the nodes of one SLURM job. What follows the script is raykernel's command:
#   sbatch --nodes=4 cluster/slurm.sh sweep drug_reviews compute.workers=32
# Submitted again, or requeued after a lost node, it computes only what is missing.
#SBATCH --job-name=raykernel
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=40G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# GPUs: sbatch --gpus-per-node=1 ..., and compute.device=cuda compute.num_gpus=1 in the command.
set -euo pipefail

# The environment with raykernel, the same on every node, is loaded here or before sbatch.
# . "$HOME/raykernel/.venv/bin/activate"
export RAYKERNEL_STORE="${RAYKERNEL_STORE:-$SLURM_SUBMIT_DIR/raykernel-store}" # seen by all nodes

# Nodes are shared with other users: nobody joins without this job's token, which srun hands on.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0

# Jobs on one node need ports of their own; those of Ray's workers end at 19999.
port=${RAY_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
gpus=${SLURM_GPUS_ON_NODE:-0}
start=(ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$gpus" --disable-usage-stats)
one=(srun --nodes=1 --ntasks=1 --overlap --cpus-per-task="$SLURM_CPUS_PER_TASK")

# The name may have several addresses; Ray takes one.
address=$("${one[@]}" --nodelist="$head" hostname --ip-address | awk '{print $1}')
"${one[@]}" --nodelist="$head" \
  "${start[@]}" --head --node-ip-address="$address" --port="$port" --include-dashboard=false &
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

tries=0
until ray health-check --address "$address:$port" >/dev/null 2>&1; do
  tries=$((tries + 1))
  test "$tries" -lt 60 || { echo "Ray did not start on $head" >&2; exit 1; }
  sleep 2
done
for node in "${nodes[@]:1}"; do
  "${one[@]}" --nodelist="$node" "${start[@]}" --address="$address:$port" &
done

raykernel "$@" compute=ray compute.address="$address:$port"
