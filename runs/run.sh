# What the scripts of this folder share. They source this file, then call
#
#     run NAME FLAGS...
#
# for each run, and `finish` after the last. A run trains into out/NAME. One that is finished is
# skipped, one that was begun goes on, all others start. So a script can be interrupted with Ctrl-C
# and started again. PYTHON=... chooses another python: its full path, or from the repository on.
#
# JOBS=2 bash runs/baselines.sh does two runs at a time, each on its share of the cores, and writes
# what they print to out/NAME.txt. Two of these small models on one core each are done sooner than
# one after the other on both cores: it saves about a quarter of the time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
# For a table that AdamW trains. It suits the hash, PEER and Memory+ as well as RowAdam or better.
adamw="--table-optimizer adamw --half-key-share 1"
at_once=${JOBS:-1}
if ((at_once > 1)); then
    cores=$(nproc)
    share=$((cores / at_once))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}
fi

# train.py saves when it is interrupted. The script must not go on with the next run then.
trap 'exit 130' INT
trap 'exit 143' TERM
trap stop_all EXIT

# Ask the runs in the background to save and stop.
stop_all() {
    for group in $(jobs -p); do
        kill -TERM -- "-$group" 2> /dev/null || true
    done
    wait
}

# Until a run in the background ends. At once, if one ended a while ago.
wait_for_one() {
    local status=0
    wait -n || status=$?
    if ((status != 0)); then
        echo "a run failed: the newest out/*.txt says why" >&2
        exit $status
    fi
}

run() {
    if ((at_once == 1)); then
        train_into "$@"
        return
    fi
    while (($(jobs -rp | wc -l) >= at_once)); do
        wait_for_one
    done
    mkdir -p out
    set -m  # a process group of its own, so that it can be stopped with all that it started
    train_into "$@" >> "out/$1.txt" 2>&1 &
    set +m
}

# Wait for the runs in the background.
finish() {
    while (($(jobs -p | wc -l) > 0)); do
        wait_for_one
    done
}

# train_into NAME FLAGS...
train_into() {
    local out=out/$1
    shift
    if [[ -e $out/result.json ]]; then
        echo "$out is finished"
    elif [[ -e $out/config.json ]]; then
        echo "$out goes on"
        $python train.py --resume --out-dir "$out"
    else
        echo "$out starts"
        $python train.py "$@" --out-dir "$out"
    fi
}
