#!/bin/bash
# Train one part over several hosts under SLURM, again and again until it is finished:
#
#     sbatch --export=ALL,SYSTEM=/shared/system,SHARDS=/shared/shards recipes/paper/slurm.sh stage1 --preset paper
#
# What follows the script goes to `metis train part`. Run it from a clone with its .venv, on a disk that all hosts see.
# Never run on a cluster by us; the steps that need no SLURM (torchrun, signals, going on) were tried on a CPU.

#SBATCH --job-name=metis
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1           # one torchrun a host; it starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64            # 8 processes with 2 loader workers each, and room for threads
#SBATCH --time=24:00:00
#SBATCH --requeue                     # after a failed host or preemption the job begins again, from the newest state
#SBATCH --open-mode=append            # one log over all requeues
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@900           # 15 minutes before the limit, to this shell alone

set -uo pipefail
: "${SYSTEM:?folder of the system}" "${SHARDS:?folder of the token shards}"
part=${1:?which part, such as stage1}
gpus=${SLURM_GPUS_ON_NODE:-8}
states="$SYSTEM/runs/$part/states"
if [ -e "$SYSTEM/runs/$part/finished" ]; then
    echo "$part is finished"
    exit 0
fi

export METIS_HOME=${METIS_HOME:-$SYSTEM/home}
export OMP_NUM_THREADS=4
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300   # torchrun's patience after SIGTERM (newer PyTorch): a state takes a while
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# SIGTERM to the training processes, not to torchrun and not to the loader workers: only they have `-u -m` in their
# command line. They finish the step, write a state and the weights so far, and end with 0.
stop() {
    echo "$(date): time is nearly over, asking for a state"
    srun --overlap --nodes="$SLURM_NNODES" --ntasks-per-node=1 \
        pkill -TERM -u "$USER" -f "[-]u -m metis_lib train part $part "   # brackets: not the srun that says this
}
trap stop USR1

srun --kill-on-bad-exit=1 .venv/bin/torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$gpus" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 20000))" --rdzv-id="$SLURM_JOB_ID" \
    -m metis_lib train part "$@" --out "$SYSTEM" --shards "$SHARDS" --workers 2 &
child=$!
while kill -0 $child 2>/dev/null; do      # a trapped signal ends `wait` early
    wait $child
done
wait $child; code=$?

left=$(find "$states" -name 'step-*.ckpt' 2>/dev/null | sort | tail -n 1)
if [ -e "$SYSTEM/runs/$part/finished" ]; then
    echo "$(date): $part is finished"
elif [ "$code" -eq 0 ]; then
    echo "$(date): stopped at $(basename "$left"), requeued"
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "$(date): failed with $code; the newest state is ${left:-none}; read the log, then submit again"
    exit "$code"                          # not requeued: the same data and settings would most likely fail again
fi
