# shellcheck shell=bash disable=SC2034  # what is set here is used where it is sourced
# What the batch scripts have in common. Sourced by them; every variable below may be set in the environment of sbatch.
#
#   FLOWRL_HOME        this repository, on a file system that all nodes share (default: where sbatch was called)
#   FLOWRL_PYTHON      the python that has it installed (default: FLOWRL_HOME/.venv/bin/python where there is one, else
#                      python3)
#   FLOWRL_SETUP       a file to source first on every node: `module load`, `source .../activate`, variables of the site
#   FLOWRL_IMAGE       a container image: of Pyxis where srun knows --container-image, else an Apptainer image
#   FLOWRL_MOUNTS      what the container sees beside FLOWRL_HOME, as /data:/data,/scratch:/scratch
#
# NCCL: its defaults are good, and what has to be set is the site's. These are the ones that are most often needed; they
# are passed on from the environment of sbatch, and to be set there or in FLOWRL_SETUP, and nowhere else:
#
#   NCCL_SOCKET_IFNAME  interface for bootstrap, as ib0 or =eth0; GLOO_SOCKET_IFNAME is set to the same where it is one
#   NCCL_IB_HCA         InfiniBand devices, as mlx5_0,mlx5_1
#   NCCL_DEBUG          WARN, or INFO for the first run on a machine
#   TORCH_NCCL_TRACE_BUFFER_SIZE   collectives that PyTorch's flight recorder keeps (set to 2000 here where it is not)

set -uo pipefail

FLOWRL_HOME=${FLOWRL_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
if [[ -z ${FLOWRL_PYTHON:-} ]]; then
    FLOWRL_PYTHON=python3
    [[ -x $FLOWRL_HOME/.venv/bin/python ]] && FLOWRL_PYTHON=$FLOWRL_HOME/.venv/bin/python
fi
export FLOWRL_HOME FLOWRL_PYTHON
export PYTHONPATH=$FLOWRL_HOME${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
if [[ ${NCCL_SOCKET_IFNAME:-} =~ ^=?([A-Za-z0-9._-]+)$ && -z ${GLOO_SOCKET_IFNAME:-} ]]; then # a name, and no list
    export GLOO_SOCKET_IFNAME=${BASH_REMATCH[1]}
fi

say() {
    printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2
}

# The command line of what runs on a node, made of its arguments: after FLOWRL_SETUP, deaf to the notice itself (python's
# launcher would end by it; its ranks listen), and in the container, if there is one.
CONTAINER=()
INSIDE=()
if [[ -n ${FLOWRL_IMAGE:-} ]]; then
    mounts=$FLOWRL_HOME:$FLOWRL_HOME${FLOWRL_MOUNTS:+,$FLOWRL_MOUNTS}
    if srun --help 2>/dev/null | grep -- --container-image >/dev/null; then
        CONTAINER=(--container-image "$FLOWRL_IMAGE" --container-mounts "$mounts" --no-container-mount-home)
    elif command -v apptainer >/dev/null; then
        INSIDE=(apptainer exec --nv --bind "$mounts" "$FLOWRL_IMAGE")
    else
        say "FLOWRL_IMAGE is set, and there is neither Pyxis (srun --container-image) nor apptainer"
        exit 2
    fi
fi
# shellcheck disable=SC2016  # it is expanded on the node
ON_NODE='trap "" USR1; [[ -z ${FLOWRL_SETUP:-} ]] || source "$FLOWRL_SETUP" || exit 2; exec "$@"'
# The same for a launcher of ranks: NODE_RANK among its arguments becomes the node's place.
# shellcheck disable=SC2016
ON_RANK='rank=$SLURM_NODEID; set -- "${@//NODE_RANK/$rank}"; '$ON_NODE

# A command as it runs on a node, but here: in the batch script's own place.
here() {
    if ((${#CONTAINER[@]})); then
        srun "${CONTAINER[@]}" --overlap --nodes=1 --ntasks=1 bash -c "$ON_NODE" - "$@"
    else
        bash -c "$ON_NODE" - "${INSIDE[@]}" "$@"
    fi
}

# Whether somebody has cancelled the job, which is then not to come back.
cancelled() {
    scontrol show job "$SLURM_JOB_ID" | grep -E 'JobState=CANCELLED' >/dev/null
}

# An address of a node that the others reach: SLURM's own for it, which need not be its name.
address_of() {
    local address
    address=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    printf '%s\n' "${address:-$1}"
}

# The value that a run's arguments give a setting last, as run.folder; nothing where they do not.
setting_of() {
    local name=$1 value='' argument
    shift
    for argument in "$@"; do
        [[ $argument == "$name="* ]] && value=${argument#*=}
    done
    printf '%s\n' "$value"
}
