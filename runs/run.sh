# What the scripts of this folder share. They source this file and then call
#
#     run NAME FLAGS...
#
# once for each run. It trains into out/NAME, and knows how far it has come: a run that is finished
# is skipped, one that was begun goes on, all others start. So a script can be interrupted with
# Ctrl-C and started again. PYTHON=... chooses another python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}

# train.py saves when it is interrupted. The script must not go on with the next run then.
trap 'exit 130' INT
trap 'exit 143' TERM

run() {
    run_by "$python" "$@"
}

# The same in two processes, each with one thread on a CPU and a GPU of its own otherwise. This is
# torchrun under its other name.
run_by_two() {
    run_by "$python -m torch.distributed.run --standalone --nproc_per_node=2" "$@"
}

# run_by LAUNCHER NAME FLAGS...
run_by() {
    local launcher=$1
    local out=out/$2
    shift 2
    if [[ -e $out/result.json ]]; then
        echo "$out is finished"
    elif [[ -e $out/config.json ]]; then
        echo "$out goes on"
        $launcher train.py --resume --out-dir "$out"
    else
        echo "$out starts"
        $launcher train.py "$@" --out-dir "$out"
    fi
}
