#!/bin/sh
# flannel's script of this name, with all its options.
exec "$(dirname "$(readlink -f "$0")")/weft" docker-opts "$@"
