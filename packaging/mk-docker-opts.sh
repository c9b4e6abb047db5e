#!/bin/sh
# flannel's script of this name, with all its options.
exec "$(dirname "$0")/weft" docker-opts "$@"
