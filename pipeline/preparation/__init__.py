"""Before training: data check, pack, first params, memory estimate."""
