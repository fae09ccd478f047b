#!/bin/bash
# Start-up script of a spot machine (AWS user data, or GCE metadata startup-script). Edit the four
# variables. The image needs the NVIDIA driver and Python 3.11. A replacement machine runs the same script and continues
# the run.
set -euo pipefail
RUN="/data/prepared data.root=/data/prepared model.path=/data/ltx-2.3-22b-distilled-1.1.safetensors model.text_encoder=/data/gemma-3-12b-it"
STORE="s3://my-bucket/runs"      # gs://my-bucket/runs on Google Cloud (pip install gcsfs)
DATA="s3://my-bucket/data"
CLOUD=aws                        # or gcp

mkdir -p /opt/ltx-train /data
cd /opt/ltx-train
python3.11 -m venv .venv
.venv/bin/pip install --quiet ltx-train s3fs
.venv/bin/python -c "import fsspec; fs, root = fsspec.core.url_to_fs('$DATA'); fs.get(root + '/', '/data/', recursive=True)"
printf 'RUN=%s\nSTORE=%s\nCLOUD=%s\n' "$RUN" "$STORE" "$CLOUD" > /etc/ltx-train.env
cp "$(.venv/bin/python -c 'from ltx_train.config import shipped; print(shipped("launch"))')/spot/ltx-train.service" /etc/systemd/system/
systemctl daemon-reload
systemctl enable --now ltx-train
