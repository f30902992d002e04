#!/usr/bin/env bash
# A real SLURM of two nodes on this machine, for tests: munged, one slurmctld and two slurmd. It needs root.
#   cluster.sh install        on Debian or Ubuntu, as root: install SLURM if it is missing; never fails
#   cluster.sh up FOLDER      start the daemons and print the SLURM_CONF to use; nodes n1 and n2 have 2 CPUs each
#   cluster.sh down FOLDER    end the daemons, by process id
#   cluster.sh node-down FOLDER n2 | node-up FOLDER n2     kill a node with everything it runs, or start it again
# Exit status 77: SLURM is not installed, or the user is not root. The reason is on stderr.
set -euo pipefail

if [ "$1" != install ]; then
    folder=$(mkdir -p "$2" && cd "$2" && pwd)
    export SLURM_CONF=$folder/slurm.conf
fi

missing() { printf 'no SLURM here: %s\n' "$*" >&2; exit 77; }

# Debian's packages start no daemon by themselves, because there is no configuration yet.
install() {
    command -v slurmctld >/dev/null && command -v munged >/dev/null && return
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
    echo "Installing slurm-wlm and munge with apt-get, for the SLURM tests."
    if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 600 apt-get install -y -qq slurm-wlm munge; } >/dev/null 2>&1; then
        echo "They could not be installed; the SLURM tests will be skipped."
    fi
}

configure() {
    local cpus memory
    cpus=2
    memory=$(awk '/MemTotal/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)
    mkdir -p "$folder"/{state,n1,n2,log,run}
    cat > "$SLURM_CONF" <<EOF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.socket
CryptoType=crypto/munge
SlurmUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,requeue_delay=1
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=30
MinJobAge=3600
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeAddr=n1 NodeHostname=n1 Port=16818 CPUs=$cpus RealMemory=$memory State=UNKNOWN
NodeName=n2 NodeAddr=n2 NodeHostname=n2 Port=16819 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
EOF
}

start_node() { slurmd -N "$1"; }

up() {
    local program
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null || missing "$program is not installed (apt-get install slurm-wlm munge)"
    done
    [ "$(id -u)" = 0 ] || missing "starting slurmctld and slurmd needs root"
    grep -q '[[:space:]]n1 n2 ' /etc/hosts || printf '127.0.0.1 n1 n2 # tests/slurm/cluster.sh\n' >> /etc/hosts
    configure
    dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
    chmod 0600 "$folder/munge.key"
    chmod 0755 "$folder" "$folder/run"
    munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.socket" --pid-file="$folder/run/munged.pid" \
        --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed"
    slurmctld -c
    start_node n1
    start_node n2
    for _ in $(seq 60); do
        if [ "$(sinfo -h -o %T 2>/dev/null | sort -u)" = idle ]; then
            printf '%s\n' "$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    tail -n 20 "$folder"/log/*.log >&2
    down
    missing "its daemons did not come up in 30 s; their logs are above"
}

end() { # end the process of a pid file, by the signal $2 or SIGTERM
    local pid
    [ -s "$1" ] || return 0
    pid=$(cat "$1")
    kill "${2:--TERM}" "$pid" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
    kill -KILL "$pid" 2>/dev/null || true
}

down() {
    scancel --user=root 2>/dev/null || true
    end "$folder/run/slurmd.n1.pid"
    end "$folder/run/slurmd.n2.pid"
    local pid
    for pid in $(pgrep slurmstepd); do # only those of this cluster
        if tr '\0' '\n' 2>/dev/null < "/proc/$pid/environ" | grep -qx "SLURM_CONF=$SLURM_CONF"; then kill -KILL "$pid" 2>/dev/null || true; fi
    done
    end "$folder/run/slurmctld.pid"
    end "$folder/run/munged.pid"
    if grep -q 'tests/slurm/cluster.sh' /etc/hosts; then
        grep -v 'tests/slurm/cluster.sh' /etc/hosts > "$folder/hosts" && cat "$folder/hosts" > /etc/hosts
    fi
}

# Kill everything that the node runs at once, as in a power failure.
node_down() {
    local pid parents=""
    end "$folder/run/slurmd.$1.pid" -KILL
    for pid in $(pgrep -f . | grep -vx $$); do
        if tr '\0' '\n' 2>/dev/null < "/proc/$pid/environ" | grep -qx "SLURMD_NODENAME=$1"; then
            parents="$parents $(ps -o ppid= -p "$pid")"
            kill -KILL "$pid" 2>/dev/null || true
        fi
    done
    for pid in $parents; do
        if grep -q slurmstepd "/proc/$pid/comm" 2>/dev/null; then kill -KILL "$pid" 2>/dev/null || true; fi
    done
}

case "$1" in
    install) install ;;
    up) up ;;
    down) down ;;
    node-down) node_down "$3" ;;
    node-up) start_node "$3" ;;
    *) sed -n 2,6p "$0"; exit 2 ;;
esac
