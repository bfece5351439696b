#!/usr/bin/env bash
# Builds stress*.cpp with the thread sanitizer and with those for addresses and undefined
# behaviour; runs all.
#
#     sanitize.sh [SECONDS]      for each; any report is a failure
set -euo pipefail
seconds=${1:-6}
sources=$(cd "$(dirname "$0")/.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

# The thread sanitizer needs parts of the address space that some systems' random layout takes.
fixed_layout=()
if setarch "$(uname -m)" -R true 2> /dev/null; then fixed_layout=(setarch "$(uname -m)" -R); fi

for kind in thread address,undefined; do
    cmake -S "$sources" -B "$build/$kind" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DMOE_SANITIZE="$kind" > "$build/log"
    cmake --build "$build/$kind" -j "$(nproc)" >> "$build/log" 2>&1 || { cat "$build/log"; exit 1; }
    for program in stress stress_worker stress_memory; do
        TSAN_OPTIONS="halt_on_error=1 exitcode=66" ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 \
            "${fixed_layout[@]}" "$build/$kind/$program" "$seconds" 1
    done
done
