#!/bin/sh
# Runs each file that starts a Ray of its own in a process of its own: Ray keeps the token of the first head that a
# process has spoken to, so a second head in the same process refuses it. A file that fails is run once more, and that
# is said: Ray gives a raylet 30 s to start, hard-coded, which a busy machine exceeds. Usage: ray_files.sh PYTHON MARKERS
set -u
failed=""
run() {
    "$1" -m pytest -q -m "$2" "$3"
    code=$?
    [ $code -eq 0 ] || [ $code -eq 5 ] # 5: none of its tests is wanted
}
for file in $(grep -rl --include='test_*.py' 'mark\.ray' tests | sort); do
    run "$1" "$2" "$file" && continue
    echo "AGAIN: $file"
    run "$1" "$2" "$file" || failed="$failed $file"
done
[ -z "$failed" ] || { echo "failed twice:$failed"; exit 1; }
