#!/bin/bash
# docs/options.md is what `dormouse options --markdown` prints. Arguments: the command, the page.
if ! diff -u "$2" <("$1" options --markdown); then
  echo "docs/options.md is not the table: run \`dormouse options --markdown > docs/options.md\`"
  exit 1
fi
