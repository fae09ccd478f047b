#!/bin/bash
# Start-up script of a spot machine (AWS user data, or GCE metadata startup-script). Edit the five variables. The image
# needs the NVIDIA driver and Python 3.11. A replacement machine runs the same script and continues the run.
set -euo pipefail
RUN=(/data/prepared "data.root=/data/prepared" "model.path=/data/ltx-2.3-22b-distilled-1.1.safetensors"
     "model.text_encoder=/data/gemma-3-12b-it" "run.root=/data/runs")
STORE="s3://my-bucket/runs"      # gs://my-bucket/runs on Google Cloud (gcsfs instead of s3fs below)
DATA="s3://my-bucket/data"
# One wheel for all machines (`make wheel`): another release would not continue the run in the same way.
WHEEL="s3://my-bucket/ltx_train-0.2.0-py3-none-any.whl"
CLOUD=aws                        # or gcp

id ltx > /dev/null 2>&1 || useradd --system --create-home ltx
mkdir -p /opt/ltx-train /data
cd /opt/ltx-train
python3.11 -m venv .venv
.venv/bin/pip install --quiet s3fs
fetch='import sys, fsspec; fs, root = fsspec.core.url_to_fs(sys.argv[1]); fs.get(root, sys.argv[2], recursive=len(sys.argv) > 3)'
.venv/bin/python -c "$fetch" "$WHEEL" "/opt/ltx-train/$(basename "$WHEEL")"
.venv/bin/pip install --quiet "/opt/ltx-train/$(basename "$WHEEL")"
.venv/bin/python -c "$fetch" "$DATA/" /data/ recursive
# Each word is quoted for the shell: values may hold blanks.
printf '#!/bin/bash\nexec /opt/ltx-train/.venv/bin/ltx-train supervise' > run.sh
printf ' %q' "${RUN[@]}" "supervise.store=$STORE" "supervise.notice=$CLOUD" >> run.sh
chown -R ltx: /opt/ltx-train /data
cp "$(.venv/bin/python -c 'from ltx_train.config import shipped; print(shipped("launch"))')/spot/ltx-train.service" /etc/systemd/system/
systemctl daemon-reload
systemctl enable --now ltx-train
