#!/usr/bin/env bash
# From a Hugging Face model and text to a family of sub-networks with routers, three exports and a report.
#   examples/chain.sh HF_DIR TEXT OUT [keys of `flextron elastic` ...]
# For example: examples/chain.sh models/TinyLlama corpus run trainer.precision=bf16 trainer.max_steps=2000
# After an interruption run the same command again: complete stages are skipped, training continues. Environment variables:
# SAMPLES (of importance; 512), ROUNDS (of latency; 20), ROUTER_STEPS (1000).
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,4s/^# *//p' "$0" >&2; exit 2; }
hf=$1 text=$2 out=$3
shift 3

stage() { # NAME STAGE keys...: run a stage into $out/NAME unless it is complete
    local name=$1
    shift
    [ -f "$out/$name/metrics.json" ] || flextron "$@" out="$out/$name"
}

stage data prepare input="$text" tokenizer="$hf"
stage imported import hf="$hf"
stage sorted importance checkpoint="$out/imported" data="$out/data" samples="${SAMPLES:-512}" ablation_batches=4
stage evaluate_before evaluate checkpoint="$out/sorted" data="$out/data" limit_val_batches=8
stage elastic elastic checkpoint="$out/sorted" data="$out/data" "$@"
stage evaluate evaluate checkpoint="$out/elastic" data="$out/data" limit_val_batches=8
stage latency latency checkpoint="$out/elastic" rounds="${ROUNDS:-20}"
stage router router checkpoint="$out/elastic" data="$out/data" latency="$out/latency" trainer.max_steps="${ROUTER_STEPS:-1000}"
# The report's family.json lists the networks that were evaluated. The smallest of them is exported below.
stage report report run="$out"
python3 - "$out" <<'PY'
import json, sys
run = sys.argv[1]
family = json.load(open(f"{run}/report/family.json"))["family"]
smallest = min(family, key=lambda net: net["parameters"])
json.dump(smallest["subnetwork"], open(f"{run}/smallest.json", "w"))
PY
stage export_full export checkpoint="$out/elastic"
stage export_smallest export checkpoint="$out/elastic" subnetwork="$out/smallest.json"
stage export_budget export checkpoint="$out/router" budget="0.7 parameters"
