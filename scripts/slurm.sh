#!/usr/bin/env bash
# One run on one or more machines of a Slurm cluster, a process for every GPU, from the project's folder on a shared disk:
#
#   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm.sh model=gpt2 dataset=fineweb_edu attention=mla parallel=fsdp
#
# Before its time limit, after pre-emption and after a broken machine the job goes back into the queue; its arguments give
# the run the same name again, so it continues from the newest checkpoint. A killed process restarts all within the job.
#SBATCH --job-name=attention-ablation
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -u

python=.venv/bin/python
[ -x "$python" ] || python=python
first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
srun "$python" -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first_host:$port" \
    train_model.py "$@" &
srun_id=$!
# A trapped signal ends a wait early; the run goes on until Slurm ends it.
status=0
while kill -0 "$srun_id" 2> /dev/null; do
    wait "$srun_id"
    status=$?
done
exit "$status"
