"""The mini world: `vocabulary`, `scenes`, `phrases`, `export` (to official layouts), pre-training of its towers."""
