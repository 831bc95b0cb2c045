#!/bin/sh
# Runs each file that starts a Ray of its own in a process of its own: Ray keeps the token of the first head that a
# process has spoken to, so a second head in the same process refuses it. Usage: ray_files.sh PYTHON MARKERS
set -u
failed=0
for file in $(grep -rl --include='test_*.py' 'mark\.ray' tests | sort); do
    "$1" -m pytest -q -m "$2" "$file"
    code=$?
    [ $code -eq 0 ] || [ $code -eq 5 ] || failed=1 # 5: none of its tests is wanted
done
exit $failed
