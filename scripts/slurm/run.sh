# What both .sbatch files do. Two minutes before the time limit SLURM sends USR1 (--signal): the run is stopped and the job
# put back into the queue. Started again, by that or after a preemption, the same command goes on where it stopped.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [ -f offline.sh ]; then . ./offline.sh; fi # what `python -m vzip prefetch ... > offline.sh` wrote

stop_and_requeue() {
  echo "the time limit is near: back into the queue"
  kill -TERM "$step" 2>/dev/null || true
  wait "$step" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}

# Since SLURM 22.05 srun takes --cpus-per-task from here and not from sbatch.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
srun "${PYTHON:-.venv/bin/python}" "$@" &
step=$!
trap stop_and_requeue USR1
wait "$step"
