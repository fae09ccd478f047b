# shellcheck shell=bash
# What the job scripts of this folder share. `ltx-train submit` copies it into the scripts that it writes.
#
#   run_step HUNG_RESTARTS DEVICE_RESTARTS COMMAND...
#
# Runs a job step, hands it the notice before the time limit, and requeues the job by the step's exit code:
#   75  the run has saved: requeued
#   76  the run hung: requeued while the job was restarted fewer than HUNG_RESTARTS times
#   71  a GPU failed: requeued without its node, at most DEVICE_RESTARTS times
# Call it with LTX_TRAIN_LOST_DEVICES set to a file on a disk that all nodes see: there a rank names the node of its GPU.

run_step() {
  local hung_restarts=$1 device_restarts=$2 noticed='' step code=1 known=0 faults=0
  shift 2
  touch "$LTX_TRAIN_LOST_DEVICES"
  known=$(wc -l < "$LTX_TRAIN_LOST_DEVICES")
  # SLURM sends the notice to this shell alone; srun forwards it to every task.
  trap hand_on_notice USR1
  "$@" &
  step=$!
  # A trapped signal interrupts wait.
  while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
  trap '' USR1
  # 138: the notice came before the tasks had set up their handlers; there is nothing to save yet.
  if [ -n "$noticed" ] && [ "$code" = 138 ]; then code=75; fi
  # The other ranks end with codes of their own when one loses its GPU.
  if [ "$code" != 0 ] && [ "$(wc -l < "$LTX_TRAIN_LOST_DEVICES")" -gt "$known" ]; then code=71; fi
  echo "$(date -Is) job ${SLURM_JOB_ID} ended with ${code}"
  faults=$(cut -d ' ' -f 1 "$LTX_TRAIN_LOST_DEVICES" | sort -u | wc -l)
  if [ "$code" = 75 ] || { [ "$code" = 76 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$hung_restarts" ]; }; then
    scontrol requeue "${SLURM_JOB_ID}"
  elif [ "$code" = 71 ] && [ "$faults" -le "$device_restarts" ]; then
    requeue_elsewhere
  fi
  return "$code"
}

# In the variables of run_step. The notice is repeated until the step has ended: one that reaches srun while it starts its
# tasks is lost, and a run ignores all but the first.
# shellcheck disable=SC2329  # the trap invokes it
hand_on_notice() {
  noticed=1
  kill -USR1 "$step" 2>/dev/null
  (sleep 5; kill -USR1 "$$") > /dev/null 2>&1 &
}

# Nodes can be excluded from a pending job alone, and a requeued one is pending at once, but SLURM then ends this shell.
requeue_elsewhere() {
  local nodes
  nodes=$(cut -d ' ' -f 2 "$LTX_TRAIN_LOST_DEVICES" | sort -u | paste -s -d ,)
  echo "$(date -Is) job ${SLURM_JOB_ID} goes on without ${nodes}"
  trap '' TERM
  scontrol requeue "${SLURM_JOB_ID}"
  for _ in 1 2 3 4 5; do
    scontrol update "JobId=${SLURM_JOB_ID}" "ExcNodeList=${nodes}" && return
    sleep 0.5
  done
}
