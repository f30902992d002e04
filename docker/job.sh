#!/usr/bin/env bash
# Pretrain in a container on SLURM: sbatch docker/job.sh CONFIG [key=value ...]
#
#   sbatch --nodes 8 docker/job.sh configs/simclr_imagenet.yaml data.root=/data/imagenet output=/runs/simclr
#
# IMAGE is the path of the image: .sqsh for enroot with pyxis, .sif for Apptainer. MOUNTS lists the mounts
# for either. The jobs of the array run one after the other. Each resumes from the newest intact
# checkpoint, or ends at once if the run is finished. Every rank gets a signal to save 120 seconds before
# the time limit. This script has not been run, because no such cluster was available.
#SBATCH --job-name=ssl_pretrain --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12
#SBATCH --time=24:00:00 --signal=USR2@120 --requeue --array=1-4%1 --output=ssl_pretrain_%A_%a.log
set -euo pipefail

image=${IMAGE:-$PWD/ssl_pretrain.sqsh} mounts=${MOUNTS:-/data:/data,/runs:/runs}
[ $# -ge 1 ] || { echo "error: no config; usage: sbatch docker/job.sh CONFIG [key=value ...]" >&2; exit 2; }
[ -e "$image" ] || { echo "error: no image at $image; set IMAGE to its path, or build it (docker/README.md)" >&2; exit 2; }
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${MASTER_ADDR%%$'\n'*}
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) OMP_NUM_THREADS=1

# Set the variables that torchrun would set. exec makes signals reach Python.
# shellcheck disable=SC2016  # expanded by each task
rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
cd /ssl_pretrain && exec .venv/bin/python -m ssl_pretrain.train "$@"'

case $image in
    *.sif) srun apptainer exec --nv --bind "$mounts" "$image" bash -c "$rank" rank "$@" ;;
    *) srun --container-image="$image" --container-mounts="$mounts" bash -c "$rank" rank "$@" ;;
esac
