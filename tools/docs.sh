#!/usr/bin/env bash
# Builds the site into build/site: `docs.sh <python>`; `docs.sh <python> --outside` checks its links to other sites, too.
set -euo pipefail
cd "$(dirname "$0")/.."
sphinx=("$1" -m sphinx --color -c docs --fail-on-warning --keep-going -d build/site-doctrees)
"${sphinx[@]}" --quiet . build/site
"$1" tools/check_site.py build/site
if [ "${2:-}" = --outside ]; then
  "${sphinx[@]}" -b linkcheck . build/site-links
fi
echo "The site: build/site/index.html"
