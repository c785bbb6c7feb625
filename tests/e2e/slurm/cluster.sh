#!/usr/bin/env bash
# A real SLURM cluster of two virtual nodes (node1, node2) on this machine, all of its files under DIR. Needs root
# and Debian's slurm-wlm and munge.
#
#   cluster.sh start DIR    then: export SLURM_CONF=DIR/slurm.conf
#   cluster.sh stop DIR
set -euo pipefail
export PATH="$PATH:/usr/sbin"
action=$1
dir=$(realpath -m "$2")
export SLURM_CONF=$dir/slurm.conf

start() {
    mkdir -p "$dir"/{state,spool1,spool2}
    chmod 755 "$dir"
    dd if=/dev/urandom of="$dir/munge.key" bs=64 count=1 status=none
    chmod 600 "$dir/munge.key"
    # the nodes' names mean this machine, for what runs on the nodes only
    { cat /etc/hosts; echo "127.0.0.1 node1 node2"; } >"$dir/hosts"
    cat >"$SLURM_CONF" <<CONF
ClusterName=virtual
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.socket
SlurmctldPort=26817
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdLogFile=$dir/slurmd-%n.log
SlurmdSpoolDir=$dir/spool-%n
StateSaveLocation=$dir/state
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=1000000,batch_sched_delay=1
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
KillWait=30
NodeName=node1 NodeAddr=127.0.0.1 NodeHostname=$(hostname -s) Port=26818 CPUs=1 RealMemory=4000
NodeName=node2 NodeAddr=127.0.0.1 NodeHostname=$(hostname -s) Port=26819 CPUs=1 RealMemory=4000
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=60 State=UP
CONF
    munged --force --key-file "$dir/munge.key" --socket "$dir/munge.socket" --pid-file "$dir/munged.pid" \
        --seed-file "$dir/munge.seed" --log-file "$dir/munged.log"
    slurmctld -f "$SLURM_CONF"
    for number in 1 2; do # each node has a core of its own, where there are two
        # shellcheck disable=SC2016
        unshare --mount sh -c 'mount --bind "$1/hosts" /etc/hosts && exec taskset --cpu-list "$3" slurmd -f "$SLURM_CONF" -N "$2"' \
            sh "$dir" "node$number" $(((number - 1) % $(nproc)))
    done
    for _ in $(seq 60); do
        [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 2 ] && return
        sleep 0.5
    done
    echo "the nodes did not come up; see $dir/*.log" >&2
    exit 1
}

# Ends the daemons by the ids that they wrote down, and waits for them.
stop() {
    if [ -e "$SLURM_CONF" ]; then
        timeout 20 scancel --user root 2>/dev/null || true
        for _ in $(seq 40); do
            [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break
            sleep 0.5
        done
    fi
    for name in slurmd-node1 slurmd-node2 slurmctld munged; do
        pid=$(cat "$dir/$name.pid" 2>/dev/null) || continue
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 40); do
            kill -0 "$pid" 2>/dev/null || continue 2
            sleep 0.25
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
}

"$action"
